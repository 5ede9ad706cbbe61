"""A sweep as a Slurm job array: one task for each series, which trains its points one after the other."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import write_atomically
from megatron_hyperp.scaling.spec import Spec

SCRIPT_FILE = "sweep.sbatch"


def script(spec: Spec, words: list[str], *, name: str, folder: Path, workers: int) -> str:
    """Return the job-array script.

    Args:
        spec: the sweep; its ``slurm`` section becomes ``#SBATCH`` lines.
        words: of the command line that runs a task, but for its number.
        name: of the job.
        folder: of the sweep, where the tasks' output goes.
        workers: tasks at a time.
    """
    options = {
        "job-name": name,
        "array": f"0-{len(spec.series) - 1}%{workers}",
        "output": str(folder.resolve() / "slurm-%a.log"),
        "ntasks": 1,
        **spec.slurm,
    }
    lines = [f"#SBATCH --{option}={value}" for option, value in options.items()]
    task = f'{shlex.join([sys.executable, *words])} --task "$SLURM_ARRAY_TASK_ID"'
    return "\n".join(["#!/usr/bin/env bash", *lines, f"cd {shlex.quote(str(Path.cwd()))}", f"exec {task}", ""])


def submit(text: str, folder: Path) -> str:
    """Write the script into the sweep's folder and submit it; return what sbatch says.

    Raises:
        UsageError: there is no sbatch on this machine, or it refuses the script.
    """
    path = folder / SCRIPT_FILE
    write_atomically(path, text)
    if shutil.which("sbatch") is None:
        raise UsageError(
            f"there is no sbatch here; submit {path} on a machine of the cluster, or leave --slurm out to train here"
        )
    result = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UsageError(f"sbatch refuses {path}: {' '.join(result.stderr.split())}; mend the sweep's slurm section")
    return result.stdout.strip()
