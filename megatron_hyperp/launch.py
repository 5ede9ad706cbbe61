"""How this process was started: as one of several ranks, by torchrun's variables, or alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_hyperp.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set by launchers for each of the processes that they start together. SLURM_NTASKS is not among them: Slurm sets it to
# the size of the allocation in the shells of salloc and sbatch as well, where a command is one process.
PROCESS_COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Launch:
    """One rank of several.

    Attributes:
        rank: of this process in the job.
        world_size: ranks of the job.
        local_rank: of this process on its node.
        address: name or address of rank 0's node.
        port: TCP port there at which the ranks meet.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def launch() -> Launch | None:
    """Read torchrun's variables, which other launchers may set as well; None for a process on its own.

    Raises:
        UsageError: some of the variables are missing or contradict each other, or several processes were started
            without them, so that each would train alone.
    """
    if "RANK" not in os.environ:
        for name in PROCESS_COUNTS:
            if os.environ.get(name, "1") != "1":
                raise UsageError(
                    f"{name} is {os.environ[name]} but RANK is not set; start the ranks with torchrun, or give each"
                    f" process {', '.join(VARIABLES)}"
                )
        return None
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"RANK is set but not {', '.join(missing)}; start the ranks with torchrun, give each process"
            f" {', '.join(VARIABLES)}, or unset RANK to train in one process"
        )
    world_size = number("WORLD_SIZE", os.environ["WORLD_SIZE"], 1, 2**31 - 1)
    return Launch(
        rank=number("RANK", os.environ["RANK"], 0, world_size - 1),
        world_size=world_size,
        local_rank=number("LOCAL_RANK", os.environ["LOCAL_RANK"], 0, world_size - 1),
        address=os.environ["MASTER_ADDR"],
        port=number("MASTER_PORT", os.environ["MASTER_PORT"], 1, 65535),
    )


def number(name: str, text: str, least: int, most: int) -> int:
    """Read a whole number of a variable. Raises: UsageError: it is none, or out of range."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise UsageError(f"{name} is {text!r}; it must be a whole number from {least} to {most}")
    return int(text)
