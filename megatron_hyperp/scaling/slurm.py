"""A sweep as a Slurm job array: one task for each series, which trains its points one after the other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from megatron_hyperp.errors import UsageError
from megatron_hyperp.scaling.spec import Spec


def array(spec: Spec, template: Path, words: list[str], *, name: str, folder: Path, workers: int) -> list[str]:
    """Return the command that submits the job array.

    Args:
        spec: the sweep; its ``slurm`` section becomes options of sbatch.
        template: the batch script; it runs its words with the task's number.
        words: of the command line that runs a task, but for its number.
        name: of the job.
        folder: of the sweep, where the tasks' output goes.
        workers: tasks at a time.
    """
    options = {
        "job-name": name,
        "array": f"0-{len(spec.series) - 1}%{workers}",
        "output": str(folder.resolve() / "slurm-%a.log"),
        **spec.slurm,
    }
    return [
        "sbatch",
        *(f"--{option}={value}" for option, value in options.items()),
        str(template),
        sys.executable,
        *words,
    ]


def submit(command: list[str], folder: Path) -> str:
    """Submit the job array of :func:`array`; return what sbatch says.

    Raises:
        UsageError: there is no sbatch on this machine, or it refuses the array.
    """
    if shutil.which("sbatch") is None:
        raise UsageError(
            "there is no sbatch here; give --print-slurm for the command to run on a machine of the cluster, or leave"
            " --slurm out to train here"
        )
    # Slurm does not make the folder of a job's output.
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UsageError(f"sbatch refuses the sweep: {' '.join(result.stderr.split())}; mend the sweep's slurm section")
    return result.stdout.strip()
