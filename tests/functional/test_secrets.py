"""A run writes no secrets of its environment, and nothing that everyone may write to."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from tests.functional.launch import ROOT, command, environment, write_config
from tests.toy import toy_config, write_corpus

NAMES = ["WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
NAMES += ["AWS_SESSION_TOKEN", "GITHUB_TOKEN", "OPENAI_API_KEY", "AZURE_STORAGE_KEY", "GOOGLE_API_KEY", "MY_PASSWORD"]
# Of the 40 hexadecimal digits that wandb wants.
SECRETS = {name: f"{number:08x}c0ffee5ec7e7c0ffee5ec7e7c0ffee5e" for number, name in enumerate(NAMES, start=1)}


def test_a_run_tells_no_secrets(tmp_path: Path) -> None:
    """Configs, metrics, events, checkpoints, TensorBoard's and wandb's files, and what is printed, on any umask."""
    folder = tmp_path / "run"
    config = write_config(
        toy_config(
            write_corpus(tmp_path, documents=200),
            folder,
            train_iters=2,
            save=str(folder / "checkpoints"),
            tensorboard_dir=str(folder / "tensorboard"),
            wandb_project="toy",
            data_cache_path=str(folder / "cache"),
        ),
        tmp_path / "config.yaml",
    )
    done = subprocess.run(
        command(config),
        cwd=ROOT,
        env=environment() | SECRETS,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: os.umask(0),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    written = [path for path in folder.rglob("*") if not path.is_symlink()]
    names = {path.name for path in written}
    assert {"config.yaml", "metrics.jsonl", "common.pt", "checksums.json", "rank_0", "lock"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert any(name.endswith(".wandb") for name in names)
    texts = {str(path): path.read_bytes() for path in written if path.is_file()}
    texts |= {"output": done.stdout.encode(), "errors": done.stderr.encode()}
    for name, secret in SECRETS.items():
        assert [place for place, text in texts.items() if secret.encode() in text] == [], name
    open_to_all = [path for path in [folder, *written] if stat.S_IMODE(path.stat().st_mode) & stat.S_IWOTH]
    assert open_to_all == []
