"""Addresses of object stores where paths belong: refused with the way out, and nothing is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import arguments
from megatron_hyperp.config import flag_name
from megatron_hyperp.data.tokenizer import load_tokenizer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import not_local
from megatron_hyperp.resolve import PATHS
from tests.unit.test_config import SMALL, resolve
from tools import (
    check_data,
    convert_checkpoint,
    evaluate,
    fit_scaling,
    generate,
    inspect_checkpoint,
    plan_run,
    preprocess_data,
    report,
    sweep,
    train_tokenizer,
)

WAYS = {
    "s3://bucket/a": "aws s3 sync",
    "gs://bucket/a": "gcsfuse",
    "az://container/a": "blobfuse2",
    "abfss://container@account/a": "azcopy",
    "hf://datasets/a": "hf download",
    "msc://profile/a": "mount its storage",
    "https://host/a": "copy it to a file system",
    "file:///data/a": "leave out file://",
    "s3:/bucket/a": "aws s3 sync",
}


@pytest.mark.parametrize(("address", "way"), WAYS.items())
def test_an_address_comes_with_its_way_out(address: str, way: str) -> None:
    fault = not_local(address)
    assert fault is not None
    assert fault.startswith(f"{address} is an address, not a path")
    assert way in fault


@pytest.mark.parametrize("path", ["a", "/a/b", "./s3:/a", "0.5", "null:64", "C:/a", "-", "run:1", "a//b", ""])
def test_paths_are_none(path: str) -> None:
    assert not_local(path) is None


@pytest.mark.parametrize("name", [name for names in PATHS.values() for name in names])
def test_no_path_of_a_config_is_an_address(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag_name(name)} gs://b/a is an address, .*gcsfuse, and give its path$"):
        resolve(f"{SMALL} {flag_name(name)} gs://b/a")


def test_config_files_and_tokenizers_are_none() -> None:
    with pytest.raises(UsageError, match=r"config s3://b/a.yaml is an address"):
        arguments.load_yaml("s3://b/a.yaml")
    with pytest.raises(UsageError, match=r"tokenizer hf://gpt2/tokenizer.json is an address, .*`hf download`"):
        load_tokenizer("hf://gpt2/tokenizer.json")


CONVERT = "--from hyperp --to hf"
PREPROCESS = "--tokenizer null:9"
COMMANDS: list[tuple[Callable[[list[str]], Any], str]] = [
    (check_data.main, "{}"),
    (convert_checkpoint.main, f"{CONVERT} --input {{}} --output a"),
    (convert_checkpoint.main, f"{CONVERT} --input a --output {{}}"),
    (convert_checkpoint.main, f"{CONVERT} --input a --output b --tokenizer {{}}"),
    (convert_checkpoint.main, "--from archscale --to hyperp --input a --output b --config {}"),
    (evaluate.main, "{} --data-path a"),
    (evaluate.main, "a --data-path {}"),
    (fit_scaling.main, "lr --csv {}"),
    (fit_scaling.main, "lr --csv a --plot {}"),
    (fit_scaling.main, "lr --csv a --write-base {}"),
    (generate.main, "{}"),
    (generate.main, "a --tokenizer {}"),
    (inspect_checkpoint.main, "{}"),
    (inspect_checkpoint.main, "--diff a {}"),
    (plan_run.main, "--depth 4 --yaml {}"),
    (preprocess_data.main, f"{PREPROCESS} --input {{}} --output-prefix a"),
    (preprocess_data.main, f"{PREPROCESS} --input a --output-prefix {{}}"),
    (preprocess_data.main, "--tokenizer {} --input a --output-prefix b"),
    (report.main, "{}"),
    (report.main, "a --output {}"),
    (sweep.main, "{}"),
    (sweep.main, "a --output {}"),
    (sweep.main, "a --csv {}"),
    (train_tokenizer.main, "--input a --vocab-size 9 --output {}"),
]


@pytest.mark.parametrize(("main", "words"), COMMANDS, ids=lambda value: getattr(value, "__module__", value))
def test_no_path_of_a_tool_is_an_address(
    main: Callable[[list[str]], Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, UsageError)) as caught:
        main(words.format("s3://bucket/a").split())
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 2
    assert "s3://bucket/a is an address, not a path" in capsys.readouterr().err + str(caught.value)
    assert list(tmp_path.iterdir()) == []
