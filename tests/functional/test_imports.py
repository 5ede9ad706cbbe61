"""What new interpreters import, and do not import, before they do what they are for."""

from __future__ import annotations

import subprocess
import sys

from tests.functional.launch import ROOT
from tests.integration.test_rendezvous import HERE, program


def test_the_entry_point_imports_no_torch_until_it_trains() -> None:
    """A new process imports it again, before it does what it is for."""
    code = "import sys; from examples import pretrain_gpt; pretrain_gpt.parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_check_of_a_head_is_quick() -> None:
    """It does not import torch, which takes seconds."""
    words = ["-m", "megatron_hyperp.rendezvous", "--is-head", "1"]
    with program(b"") as port:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *words, HERE, str(port), "x"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    *imports, message = done.stderr.splitlines()
    assert done.returncode == 2
    assert message.startswith(f"error: port {port} of {HERE} is taken, and not by the job 'x'; ")
    assert not [line for line in imports if line.split("|")[-1].strip() == "torch"]
