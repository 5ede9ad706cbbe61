"""The optimizer as a library: the loop of docs/api.md, stock models, wrapped models, frozen parameters, overrides."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run_distributed import ROOT, run_distributed
from tests.toy import toy_config

TP2 = {"tensor_model_parallel_size": 2}
# The model of docs/api.md in the trainer's terms.
MODEL: dict[str, Any] = {
    **{"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4},
    **{"optimizer": "muonh", "lr": 0.015, "min_lr": 0.015, "lr_decay_style": "constant", "softmax_scale": 0.25},
    **{"qk_layernorm": False, "seq_length": 64, "micro_batch_size": 8, "global_batch_size": 32, "train_iters": 10},
    **{"untie_embeddings_and_output_weights": True, "clip_grad": 1.0, "quiet": True},
}


def documented_loop() -> tuple[str, str]:
    """The first block of docs/api.md, up to the optimizer and from there on."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), flags=re.DOTALL)[:1]
    # Statements: a call is one, over however many lines the formatter spreads it.
    statements = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.stmt)]
    assert len(statements) < 25
    before, line, after = block.partition("optimizer = ")
    return before, line + after


def trained_by_the_trainer(corpus: str, folder: str) -> tuple[Any, list[dict[str, torch.Tensor]], list[float]]:
    """Train; return the initial weights, this rank's micro-batches and the losses."""
    from unittest.mock import patch

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.training import loop

    config = toy_config(corpus, Path(folder), **MODEL, **TP2).resolve(world_size=4)
    trainer = loop.Trainer(config, load_tokenizer(config.data.tokenizer_model or ""), None)
    weights = {
        name: value.clone() for name, value in trainer.chunks[0].module.state_dict().items() if value is not None
    }
    seen: list[dict[str, torch.Tensor]] = []
    forward_step = loop.forward_step

    def recording(batches: Any, model: torch.nn.Module, *, draw: Any) -> Any:
        def drawn(source: Any) -> Any:
            seen.append(draw(source))
            return seen[-1]

        return forward_step(batches, model, draw=drawn)

    rows: list[dict[str, Any]] = []
    trainer.writer.write = rows.append  # type: ignore[method-assign,assignment]
    with patch.object(loop, "forward_step", recording):
        trainer.train()
    trainer.close_reports()
    return weights, seen, [row["loss"] for row in rows if "loss" in row]


def compare_with_the_trainer(corpus: str, folder: str) -> list[tuple[float, float]]:
    """Losses of the trainer and of the documented loop, by step."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hyperp import device

    device.adapt_megatron()
    device.init_process_group(1)
    weights, seen, expected = trained_by_the_trainer(corpus, folder)
    parallel_state.destroy_model_parallel()
    batches = iter([(batch["tokens"], batch["labels"], batch["position_ids"]) for batch in seen])
    found: list[float] = []
    space: dict[str, Any] = {"batches": batches}
    before, after = documented_loop()
    exec(before, space)
    space["model"].load_state_dict(weights, strict=False)
    missing = {name for name, _ in space["model"].named_parameters()} - weights.keys()
    assert not missing
    # The loop, with a line that notes what it trained.
    loop = after.replace("    optimizer.step()\n", "    optimizer.step()\n    note(losses)\n")
    assert loop != after

    def note(losses: list[dict[str, torch.Tensor]]) -> None:
        mean = torch.stack([each["loss"] for each in losses]).mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        found.append(float(mean) / parallel_state.get_data_parallel_world_size())

    space["note"] = note
    exec(loop, space)
    return list(zip(expected, found, strict=True))


def test_the_documented_loop_trains_as_the_trainer_does(corpus: str, tmp_path: Path) -> None:
    for pairs in run_distributed(compare_with_the_trainer, 4, corpus, str(tmp_path)):
        assert len(pairs) == 10
        assert pairs[-1][0] < 0.97 * pairs[0][0]
        for expected, found in pairs:
            assert found == pytest.approx(expected, rel=1e-6)


def stock_model(**settings: Any) -> tuple[Any, torch.nn.Module]:
    """A stock GPTModel with LayerNorm, biases and tied embeddings, and its config."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hyperp import device

    device.adapt_megatron()
    device.init_process_group(1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, **settings
    )
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=16, share_embeddings_and_output_weights=True)
    return config, model


def train_stock(kind: str) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """Train on two data-parallel ranks; return the losses, the weights and the routing table's lines."""
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_hyperp.optim import HyperPConfig, hyperp_optimizer

    config, model = stock_model(calculate_per_token_loss=kind == "bare, per token")
    model.embedding.position_embeddings.weight.requires_grad_(False)  # type: ignore[union-attr]
    chunk = model
    if kind == "wrapped":
        chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        config.finalize_model_grads_func = finalize_model_grads
    lines: list[str] = []
    options = HyperPConfig(lr=0.02, overrides={"*layers.1.mlp.linear_fc2.weight": "normuon"})
    optimizer = hyperp_optimizer([chunk], options, log=lines.append)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = [torch.randint(64, (2, 17), generator=generator) for _ in range(2)]

    def forward_step(batches: Any, model: torch.nn.Module) -> Any:
        batch = next(batches)
        losses = model(batch[:, :-1], torch.arange(16).expand(2, 16), None, labels=batch[:, 1:])
        if kind == "bare, per token":
            total, report = losses.sum(), {"loss": losses.detach().mean()}
            return losses, lambda _: (total, torch.tensor(losses.numel(), dtype=torch.int), report)
        return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    found = []
    for _ in range(6):
        optimizer.zero_grad()
        if kind == "wrapped":
            chunk.zero_grad_buffer()  # type: ignore[operator]
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(tokens),
            model=chunk,
            num_microbatches=2,
            seq_length=16,
            micro_batch_size=2,
        )
        assert optimizer.step()[0]
        found.append(sum(float(report["loss"]) for report in reports) / 2)
    assert optimizer.radius_drift() < 1e-6
    return found, {name: each.detach().clone() for name, each in model.named_parameters()}, lines


@pytest.fixture(scope="module")
def bare() -> list[Any]:
    return run_distributed(train_stock, 2, "bare")


def test_a_stock_model_trains_with_frozen_parameters_and_overrides(bare: list[Any]) -> None:
    losses, weights, lines = bare[0]
    assert losses[-1] < losses[0]
    table = {line.split()[0]: line.split()[1] for line in lines[0].splitlines()[1:]}
    assert table["decoder.layers.*.mlp.linear_fc1.weight"] == "muonh"
    assert table["embedding.word_embeddings.weight"] == table["decoder.layers.*.mlp.linear_fc1.bias"] == "adamw"
    assert "embedding.position_embeddings.weight" not in table
    assert "normuon" in {line.split()[1] for line in lines[0].splitlines()}
    for name, weight in weights.items():
        assert torch.equal(weight, bare[1][1][name]), name


@pytest.mark.parametrize("kind", ["wrapped", "bare, per token"])
def test_however_gradients_are_reduced_the_weights_are_the_same(bare: list[Any], kind: str) -> None:
    for rank, (losses, weights, _) in enumerate(run_distributed(train_stock, 2, kind)):
        assert losses == pytest.approx(bare[rank][0], rel=1e-5)
        for name, weight in weights.items():
            difference = float((weight - bare[rank][1][name]).norm() / bare[rank][1][name].norm().clamp_min(1e-6))
            assert difference < 1e-4, name


def refusals() -> list[str]:
    """What bad arguments are answered."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_hyperp.errors import UsageError
    from megatron_hyperp.optim import HyperPConfig, hyperp_optimizer

    config, model = stock_model()
    sharded = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    found = []
    for chunks, options in (
        ([], HyperPConfig(lr=1.0)),
        ([sharded, model], HyperPConfig(lr=1.0)),
        ([sharded], HyperPConfig(lr=1.0)),
        ([model], HyperPConfig(lr=1.0, overrides={"*.nothing": "adamw"})),
    ):
        with pytest.raises(UsageError) as caught:
            hyperp_optimizer(chunks, options)
        found.append(str(caught.value))
    return found


def test_bad_arguments_are_one_line() -> None:
    (found,) = run_distributed(refusals, 1)
    for line, words in zip(
        found, ("is empty", "wrap all or none", "use_distributed_optimizer=False", "match no trainable"), strict=True
    ):
        assert words in line
        assert "\n" not in line
