"""Core attention on torch's fused kernel: the values and gradients of Megatron-Core's, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tolerances
from tests.toy import one_rank

HEADS, SIZE, BATCH = 4, 16, 3
# Groups, sequence length, softmax scale.
CASES = {
    "one group": (1, 64, None),
    "two groups": (2, 64, None),
    "a group a head": (4, 64, None),
    "own scale": (2, 64, 0.7),
    "long": (2, 600, None),
    "one token": (2, 1, None),
}
NAMES = ("output", "query", "key", "value")


def core_config(groups: int, **settings: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": HEADS * SIZE, "num_attention_heads": HEADS, "num_query_groups": groups}
    return TransformerConfig(**{**sizes, "attention_dropout": 0.0, **settings})


def outcome(core: torch.nn.Module, groups: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return output and gradients for random inputs; keys come as strided views, as from the fused QKV."""
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    wide = [2 * draw(length, BATCH, HEADS, SIZE), *(draw(length, BATCH, groups, 2 * SIZE) for _ in "kv")]
    leaves = [item.to(dtype).requires_grad_() for item in wide]
    output = core(leaves[0], *(item[..., :SIZE] for item in leaves[1:]), None)
    assert output.shape == (length, BATCH, HEADS * SIZE)
    assert output.is_contiguous()
    output.backward(draw(length, BATCH, HEADS * SIZE).to(dtype))
    gradients = [leaves[0].grad, *(leaf.grad[..., :SIZE] for leaf in leaves[1:] if leaf.grad is not None)]
    return [output.detach(), *(item for item in gradients if item is not None)]


def compare() -> dict[tuple[str, str], list[list[torch.Tensor]]]:
    """Return, by case and precision, what both modules make."""
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_hyperp import arguments, device
    from megatron_hyperp.model.attention import SdpaAttention
    from megatron_hyperp.training.setup import initialize_megatron

    device.adapt_megatron()
    small = "--num-layers 1 --hidden-size 64 --num-attention-heads 4 --vocab-size 64 --train-iters 1"
    initialize_megatron(arguments.parse(small.split(), description="").resolve())
    result = {}
    for title, (groups, length, scale) in CASES.items():
        for dtype in ("float32", "bfloat16"):
            config = core_config(groups, bf16=dtype == "bfloat16")
            words = (config, 1, AttnMaskType.causal, "self")
            cores: list[Any] = [kind(*words, softmax_scale=scale) for kind in (DotProductAttention, SdpaAttention)]
            result[title, dtype] = [outcome(core, groups, length, getattr(torch, dtype)) for core in cores]
    parallel_state.destroy_model_parallel()
    return result


@pytest.fixture(scope="module")
def compared() -> dict[tuple[str, str], list[list[torch.Tensor]]]:
    with one_rank():
        return compare()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("title", CASES)
def test_values_and_gradients_are_megatron_cores(title: str, compared: Any) -> None:
    local, sdpa = compared[title, "float32"]
    for name, expected, found in zip(NAMES, local, sdpa, strict=True):
        if title == "one token" and name in ("query", "key"):
            # A softmax over one logit has no gradient.
            assert max(float(item.abs().max()) for item in (expected, found)) < tolerances.FUSED_ATTENTION
        else:
            assert error(found, expected) < tolerances.FUSED_ATTENTION, name


@pytest.mark.parametrize("title", [title for title in CASES if title != "one token"])
def test_bf16_is_no_less_accurate(title: str, compared: Any) -> None:
    exact, _ = compared[title, "float32"]
    local, sdpa = compared[title, "bfloat16"]
    for name, truth, theirs, ours in zip(NAMES, exact, local, sdpa, strict=True):
        assert ours.dtype == torch.bfloat16
        # The largest error of all is a matter of luck.
        errors = [float((item.float() - truth).norm()) for item in (ours, theirs)]
        assert errors[0] < 1.3 * errors[1], name


def core(**given: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_hyperp.model.attention import SdpaAttention

    mask = AttnMaskType[given.pop("mask", "causal")]
    kind, dropout = given.pop("kind", "self"), given.pop("dropout", None)
    return SdpaAttention(core_config(2, **given), 1, mask, kind, dropout)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"mask": "padding"}, "attn_mask_type is AttnMaskType.padding"),
        ({"kind": "cross"}, "attention_type is cross"),
        ({"dropout": 0.1}, "attention_dropout is 0.1"),
        ({"attention_dropout": 0.2}, "attention_dropout is 0.2"),
        ({"softmax_type": "off-by-one"}, "softmax_type is off-by-one"),
        ({"window_size": (8, 0)}, r"window_size is \(8, 0\)"),
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling is True"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2"),
    ],
)
def test_what_it_cannot_do_is_refused(given: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=f"{names}; SdpaAttention has .* take DotProductAttention"):
        core(**given)


@pytest.mark.parametrize("name", ["attention_mask", "attention_bias", "packed_seq_params"])
def test_what_it_is_not_to_be_given_is_refused(name: str) -> None:
    query, key = torch.zeros(8, 1, HEADS, SIZE), torch.zeros(8, 1, 2, SIZE)
    given = {"attention_mask": None, name: SimpleNamespace()}
    with pytest.raises(ValueError, match=f"{name} is given; SdpaAttention has none"):
        core()(query, key, key, **given)
    with pytest.raises(ValueError, match="8 queries and 4 keys"):
        core()(query, key[:4], key[:4])


def test_a_mask_of_the_call_is_refused() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    query = torch.zeros(8, 1, HEADS, SIZE)
    with pytest.raises(ValueError, match="no_mask"):
        core()(query, query, query, attn_mask_type=AttnMaskType.no_mask)


def test_there_is_no_unfused_fallback() -> None:
    """Torch has no fused kernel for heads that are strided, and would not say so by itself."""
    query = torch.zeros(8, 1, SIZE, HEADS).transpose(2, 3)
    torch.nn.functional.scaled_dot_product_attention(*3 * [query.permute(1, 2, 0, 3)], is_causal=True)
    with pytest.raises(RuntimeError, match="No available kernel"):
        core()(query, query, query)


def test_groups_are_expanded_where_the_kernel_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import SDPBackend

    from megatron_hyperp import device
    from megatron_hyperp.model import attention

    query, key, value = torch.randn(8, 2, HEADS, SIZE), *torch.randn(2, 8, 2, 2, SIZE)
    expected = core()(query, key, value)
    seen: list[Any] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*parts: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((parts[1].shape[1], options["enable_gqa"]))
        return original(*parts, **options)

    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    assert attention._kernel(query) is SDPBackend.EFFICIENT_ATTENTION
    assert attention._kernel(query.bfloat16()) is SDPBackend.FLASH_ATTENTION
    # The CPU has no such kernel: any other will do to see what it is given.
    monkeypatch.setattr(attention, "_kernel", lambda _: SDPBackend.MATH)
    torch.testing.assert_close(core()(query, key, value), expected)
    assert seen == [(HEADS, False)]
