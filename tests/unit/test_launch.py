"""What the launcher's variables mean, and which of them are refused in one line."""

from __future__ import annotations

import os

import pytest

from examples import pretrain_gpt
from megatron_hyperp.errors import EXIT_USAGE, UsageError, run_command
from megatron_hyperp.launch import PROCESS_COUNTS, VARIABLES, Launch, launch

RANK_1 = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
# What Slurm sets in the shell of salloc -n 8, and in addition in that of sbatch and of an interactive step.
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_NNODES": "1"}
BATCH = {**SALLOC, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
INTERACTIVE = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name in (*VARIABLES, *PROCESS_COUNTS) or name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    return monkeypatch


def set_all(variables: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name, value in given.items():
        variables.setenv(name, value)


@pytest.mark.parametrize(
    "given",
    [{}, SALLOC, BATCH, INTERACTIVE, {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, {"WORLD_SIZE": "1"}],
    ids=["alone", "salloc", "sbatch", "interactive step", "address alone", "world of one"],
)
def test_one_process(variables: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    set_all(variables, given)
    assert launch() is None
    assert pretrain_gpt.world_size() == 1


def test_one_of_several_ranks(variables: pytest.MonkeyPatch) -> None:
    set_all(variables, RANK_1 | BATCH)
    assert launch() == Launch(rank=1, world_size=4, local_rank=1, address="node1", port=29500)
    assert pretrain_gpt.world_size() == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: None}, f"RANK is set but not {name}; ") for name in VARIABLES if name != "RANK"),
        ({"MASTER_ADDR": ""}, "RANK is set but not MASTER_ADDR; "),
        ({"WORLD_SIZE": None, "MASTER_ADDR": None}, "RANK is set but not WORLD_SIZE, MASTER_ADDR; "),
        ({"RANK": None}, "WORLD_SIZE is 4 but RANK is not set; "),
        ({"RANK": "4"}, "RANK is '4'; it must be a whole number from 0 to 3"),
        ({"RANK": "-1"}, "RANK is '-1'; "),
        ({"RANK": "one"}, "RANK is 'one'; "),
        ({"RANK": "²"}, "RANK is '²'; "),
        ({"LOCAL_RANK": "8"}, "LOCAL_RANK is '8'; it must be a whole number from 0 to 3"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'; "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number from 1 "),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'; it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'; "),
    ],
)
def test_incomplete_variables_are_one_line(
    variables: pytest.MonkeyPatch, change: dict[str, str | None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(variables, {name: value for name, value in (RANK_1 | change).items() if value is not None})
    variables.setattr("megatron_hyperp.errors.leave_at_once", lambda code: None)
    with pytest.raises(SystemExit) as left:
        run_command(lambda _: pretrain_gpt.world_size(), [])
    assert left.value.code == EXIT_USAGE
    printed = capsys.readouterr().err
    assert f"error: {message}" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", PROCESS_COUNTS)
def test_several_processes_without_ranks_are_refused(variables: pytest.MonkeyPatch, name: str) -> None:
    """Each of them would train alone, in the same folders."""
    set_all(variables, {name: "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"})
    with pytest.raises(UsageError, match=f"^{name} is 8 but RANK is not set; start the ranks with torchrun"):
        launch()
