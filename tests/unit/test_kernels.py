"""Optional kernels: what is taken by itself, and what is asked for and cannot be had is refused with the reason."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_hyperp import arguments, device, libraries
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training import preflight

SMALL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --global-batch-size 8 --train-iters 4"
    " --tokenizer-model null:64 --data-path nowhere"
)
APEX = libraries.ACCUMULATION_FUSION


def parse(flags: str) -> Config:
    return arguments.parse(f"{SMALL} {flags}".split(), description="")


def cuda(monkeypatch: pytest.MonkeyPatch, there: bool = True) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


def break_import(monkeypatch: pytest.MonkeyPatch, broken: str, error: Exception) -> None:
    original = importlib.import_module

    def raises(name: str, *rest: Any) -> ModuleType:
        if name == broken:
            raise error
        return original(name, *rest)

    monkeypatch.setattr(importlib, "import_module", raises)


def test_an_extension_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, APEX)
    cuda(monkeypatch, there=False)
    assert libraries.lacks(APEX) == "CUDA"
    cuda(monkeypatch)
    assert libraries.lacks(APEX) is None


@pytest.mark.parametrize("error", [ImportError("No such module"), OSError("undefined\nsymbol"), RuntimeError("old")])
def test_an_extension_that_fails_in_any_way_is_lacking(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    cuda(monkeypatch)
    break_import(monkeypatch, APEX, error)
    assert libraries.lacks(APEX) == f"{APEX}, which cannot be imported ({str(error).replace(chr(10), ' ')})"


@pytest.mark.parametrize(
    ("flags", "there", "expected"),
    [
        ("", False, False),
        ("", True, True),
        ("--no-gradient-accumulation-fusion", True, False),
        ("--fp8-format hybrid --fp8-emulation", True, False),
    ],
)
def test_accumulation_is_fused_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, flags: str, there: bool, expected: bool
) -> None:
    from megatron_hyperp.model.build import transformer_config

    if there:
        install(monkeypatch, APEX)
        cuda(monkeypatch)
    config = parse(flags).resolve(tokenizer_vocab_size=64)
    assert transformer_config(config).gradient_accumulation_fusion is expected


def test_a_line_says_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse("").resolve(tokenizer_vocab_size=64)
    cuda(monkeypatch, there=False)
    assert libraries.describe(config) == (
        "layers: Megatron-Core's local ones (TransformerEngine needs CUDA), torch's fused attention, without apex's"
        " accumulation of gradients"
    )
    cuda(monkeypatch)
    install(monkeypatch, APEX, "transformer_engine", libraries.TRANSFORMER_ENGINE)
    assert libraries.describe(config) == (
        "layers: TransformerEngine (usable here), its attention, with apex's accumulation of gradients"
    )
    config.training.transformer_impl, config.training.attention_backend = "local", "local"
    assert "Megatron-Core's local ones (as asked), unfused attention" in libraries.describe(config)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "sdpa"),
        ("--recompute-granularity selective", "local"),
        ("--attention-backend local", "local"),
        ("--attention-backend sdpa --recompute-granularity full", "sdpa"),
    ],
)
def test_attention_is_fused_unless_it_is_recomputed(monkeypatch: pytest.MonkeyPatch, flags: str, expected: str) -> None:
    cuda(monkeypatch, there=False)
    assert libraries.attention(parse(flags).resolve(tokenizer_vocab_size=64)) == expected


def refusal(flags: str, *, everywhere: bool = True) -> str:
    with pytest.raises(UsageError) as caught:
        preflight.check(parse(flags), world_size=1)
    assert caught.value.same_on_all_ranks is everywhere
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--gradient-accumulation-fusion",
            "--gradient-accumulation-fusion needs CUDA; build NVIDIA's apex from source with --cpp_ext and --cuda_ext"
            " (not PyPI's), take an NGC image, or leave it out",
        ),
        (
            "--cross-entropy-loss-fusion --bf16",
            "--cross-entropy-loss-fusion with --cross-entropy-fusion-impl native needs CUDA; leave it out",
        ),
        (
            "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te",
            "--cross-entropy-loss-fusion with --cross-entropy-fusion-impl te needs CUDA; install TransformerEngine,"
            " give native, or leave it out",
        ),
        (
            "--fp8-format hybrid",
            "--fp8-format hybrid with --fp8-recipe tensorwise needs CUDA; give --fp8-emulation for the same numerics in"
            " emulation, or leave it out",
        ),
        (
            "--transformer-impl transformer_engine",
            "--transformer-impl transformer_engine needs CUDA; give local, or leave it out; to install it: pip install"
            " megatron-hyperp[gpu]",
        ),
    ],
)
def test_kernels_of_cuda_are_refused_on_cpu(monkeypatch: pytest.MonkeyPatch, flags: str, message: str) -> None:
    cuda(monkeypatch, there=False)
    assert refusal(flags) == message


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--gradient-accumulation-fusion", APEX),
        ("--cross-entropy-loss-fusion --cross-entropy-fusion-impl te", libraries.CROSS_ENTROPY),
        ("--fp8-format hybrid", libraries.TRANSFORMER_ENGINE),
        ("--transformer-impl transformer_engine", libraries.TRANSFORMER_ENGINE),
    ],
)
def test_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, flags: str, name: str) -> None:
    cuda(monkeypatch)
    break_import(monkeypatch, name, ImportError("not there"))
    assert f"needs {name}, which cannot be imported (not there); " in refusal(flags, everywhere=False)


def test_heads_that_flash_attention_does_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch)
    flags = "--attention-backend sdpa --bf16 --kv-channels 512"
    assert refusal(flags) == (
        "--attention-backend sdpa has heads of 256 at most under CUDA, not of 512; lower --kv-channels, or give local"
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--attention-backend sdpa --kv-channels 512",
        "--attention-backend sdpa --bf16 --kv-channels 256",
        "--gradient-accumulation-fusion",
        "--cross-entropy-loss-fusion --bf16",
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te",
    ],
)
def test_what_there_is_goes_on_to_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    monkeypatch.chdir(tmp_path)
    cuda(monkeypatch)
    install(monkeypatch, APEX, "transformer_engine", "transformer_engine.pytorch", libraries.CROSS_ENTROPY)
    with pytest.raises(UsageError, match=r"nowhere\.(idx|bin)"):
        preflight.check(parse(flags), world_size=1)
