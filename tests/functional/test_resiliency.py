"""Under ft_launcher, the launcher of nvidia-resiliency-ext: a rank that hangs is found, and all start again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.logging import read_events
from megatron_hyperp.training.resiliency import SOCKET, launcher_reports
from tests.functional.launch import ENTRY, assert_same_run, launched, train, wait_for_rows, workers, write_config
from tests.toy import toy_config

ITERATIONS = 60


@pytest.mark.slow
def test_a_hanging_rank_is_restarted_bit_for_bit(corpus: str, tmp_path: Path) -> None:
    pytest.importorskip("nvidia_resiliency_ext", reason="needs pip install nvidia-resiliency-ext")
    toy = toy_config(corpus, tmp_path, num_layers=1, train_iters=ITERATIONS, save_interval=7)
    config, run, straight = write_config(toy, tmp_path / "toy.yaml"), tmp_path / "run", tmp_path / "straight"
    timeouts = "fault_tolerance: {initial_rank_heartbeat_timeout: 120, rank_heartbeat_timeout: 10}\n"
    (tmp_path / "timeouts.yaml").write_text(timeouts)
    words = [sys.executable, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher", "--standalone"]
    words += ["--fault-tol-cfg-path", str(tmp_path / "timeouts.yaml"), "--nproc-per-node", "2", "--max-restarts", "1"]
    words += [ENTRY, "--config", str(config), "--run-dir", str(run)]
    folders = ["--save", str(run / "checkpoints"), "--load", str(run / "checkpoints")]
    with launched([*words, *folders], TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1) as launcher:
        wait_for_rows(run, 20, launcher)
        workers(launcher)[1].suspend()
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert "resumed" in [event["kind"] for event in read_events(run)]
    train(config, "--run-dir", straight, ranks=2)
    assert_same_run(run, straight, ITERATIONS)


def test_other_launchers_are_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOCKET, raising=False)
    with launcher_reports() as report:
        report()


def test_the_package_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOCKET, "/nowhere")
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", None)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(UsageError, match="install it for this Python"), launcher_reports():
        pass
