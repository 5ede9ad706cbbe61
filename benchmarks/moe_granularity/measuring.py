"""What is measured of a mixture of experts: its block's output, at the start and after training, and held-out loss."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hyperp import device
from megatron_hyperp.config import (
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_hyperp.data.corpus import python_corpus_paths

# Tokens are bytes; the last one ends a document.
VOCABULARY = 257
LENGTH = 128
BATCH = 16
# The held-out twentieth of a corpus has to hold all tokens on which outputs and losses are measured.
CORPUS_BYTES = 4_000_000
MEASURED_SEQUENCES = 128
SPLIT = "95,5,0"
EVALUATIONS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model: experts of FFN size 4 width / topk, of which each token takes topk out of sparsity x topk.

    Attributes:
        topk: K, the shared expert included.
        gate: "sqrt" or "softmax".
        sparsity: S.
        width: hidden size w.
        shared: one of the K experts is shared by all tokens.
        seed: of weights and data order.
        lr: peak learning rate.
        iterations: of training.
    """

    topk: int
    gate: str
    sparsity: int = 4
    width: int = 64
    shared: bool = False
    seed: int = 1
    lr: float = 0.12
    iterations: int = 0

    def config(self, prefix: str, run_dir: str) -> Config:
        """Return the config, not yet resolved."""
        return Config(
            model=ModelConfig(
                num_layers=2,
                hidden_size=self.width,
                num_attention_heads=self.width // 16,
                seq_length=LENGTH,
                vocab_size=VOCABULARY,
            ),
            moe=MoEConfig(
                moe_sparsity=self.sparsity,
                moe_topk=self.topk,
                moe_shared_expert=self.shared,
                moe_gate=self.gate,  # type: ignore[arg-type]
            ),
            optimizer=OptimizerConfig(lr=self.lr),
            data=DataConfig(data_path=[prefix], split=SPLIT, tokenizer_model=f"null:{VOCABULARY}"),
            training=TrainingConfig(
                micro_batch_size=BATCH,
                global_batch_size=BATCH,
                train_iters=max(1, self.iterations),
                eval_interval=max(1, self.iterations),
                eval_iters=EVALUATIONS,
                seed=self.seed,
            ),
            logging=LoggingConfig(run_dir=run_dir),
        )


@dataclass(frozen=True, slots=True)
class Output:
    """Mean squares of one block's output and of what it is a sum of.

    The routed part of the output is sum_i g_i e_i. Its mean square would be ``experts`` if the e_i were uncorrelated.

    Attributes:
        block: mean square of the block's output, before the residual multiplier.
        gates: mean over tokens of sum_i g_i^2.
        experts: mean over tokens of sum_i g_i^2 e_i^2, the e_i^2 averaged over their elements.
        shared: mean square of the shared expert's output; 0 without one.
        constant: mean square of the block's output averaged over tokens, the part that is the same for all of them.
    """

    block: float
    gates: float
    experts: float
    shared: float
    constant: float

    @property
    def rms(self) -> float:
        """RMS of the block's output."""
        return self.block**0.5

    @property
    def expert_rms(self) -> float:
        """RMS of a routed expert's output on the tokens that chose it, weighted by the squares of its gates."""
        return (self.experts / self.gates) ** 0.5

    @property
    def coherence(self) -> float:
        """The block's mean square over that of uncorrelated experts: 1 if they are, above if they pull together."""
        uncorrelated = (self.experts + self.shared) / 2 if self.shared else self.experts
        return self.block / uncorrelated


def mean(outputs: Sequence[Output]) -> Output:
    """Average mean squares, of several seeds say."""
    fields = zip(*map(dataclasses.astuple, outputs), strict=True)
    return Output(*(sum(values) / len(outputs) for values in fields))


class Probe:
    """Adds up squares of what a ``HyperPMoELayer`` and its parts put out, by forward hooks.

    Args:
        block: the layer.
    """

    def __init__(self, block: Any) -> None:
        self._sums = dict.fromkeys(("block", "gates", "experts", "shared"), 0.0)
        self._total: Any = 0.0
        self._elements = self._tokens = 0
        parts = [(block, "block"), (block.router, "gates"), (block.experts, "experts")]
        parts += [(block.shared_experts, "shared")] if block.use_shared_expert else []
        self._hooks = [module.register_forward_hook(self._adder(name)) for module, name in parts]

    def _adder(self, name: str) -> Any:
        def add(_: torch.nn.Module, __: Any, output: Any) -> None:
            # Blocks and experts return their bias, and routers their choice, beside it. Experts' outputs hold gates.
            values = output[0] if isinstance(output, tuple) else output
            self._sums[name] += float(values.detach().square().sum(dtype=torch.float64))
            if name == "block":
                self._total = self._total + values.detach().flatten(0, -2).sum(dim=0, dtype=torch.float64)
                self._elements += values.numel()
                self._tokens += values[..., 0].numel()

        return add

    def take(self) -> Output:
        """Detach the hooks; return what they saw."""
        for hook in self._hooks:
            hook.remove()
        sums, elements = self._sums, self._elements
        return Output(
            block=sums["block"] / elements,
            gates=sums["gates"] / self._tokens,
            experts=sums["experts"] / elements,
            shared=sums["shared"] / elements,
            constant=float((self._total / self._tokens).square().mean()),
        )


def blocks(chunk: torch.nn.Module) -> list[Any]:
    """Return a model's mixture-of-experts blocks, in order."""
    from megatron_hyperp.moe.layer import HyperPMoELayer

    return [module for module in chunk.modules() if isinstance(module, HyperPMoELayer)]


@torch.no_grad()
def outputs_in_model(chunk: torch.nn.Module, tokens: torch.Tensor) -> list[Output]:
    """Run the model on tokens [sequences, length]; return each block's output."""
    probes = [Probe(block) for block in blocks(chunk)]
    chunk.eval()
    for batch in tokens.split(BATCH):
        chunk(batch, torch.arange(batch.shape[1]).expand_as(batch), None)
    chunk.train()
    return [probe.take() for probe in probes]


@torch.no_grad()
def output_of_random(chunk: torch.nn.Module, tokens: int, seed: int) -> Output:
    """Run the first block alone on random inputs of RMS 1, such as come from a norm."""
    block = blocks(chunk)[0]
    width = block.config.hidden_size
    probe = Probe(block)
    block.eval()
    noise = torch.randn(tokens, 1, width, generator=torch.Generator().manual_seed(seed))
    block(torch.nn.functional.rms_norm(noise, (width,)))
    block.train()
    return probe.take()


@contextlib.contextmanager
def alone(config: Config) -> Iterator[Config]:
    """Resolve a config and join a process group of one gloo rank for it; leave it, and what Megatron-Core made."""
    device.adapt_megatron()
    from megatron.core import parallel_state

    device.init_process_group(10)
    yield config.resolve(world_size=1, tokenizer_vocab_size=VOCABULARY)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Threads of gloo go with the groups that they serve.
    gc.collect()


def at_start(case: Case, prefix: str) -> tuple[list[Output], Output]:
    """Return what an untrained model's blocks put out on held-out text, and the first one alone on random inputs."""
    with alone(case.config(prefix, "unused")) as config:
        from megatron_hyperp.model.build import build_balance, build_model, transformer_config
        from megatron_hyperp.training.setup import initialize_megatron

        initialize_megatron(config)
        (chunk,) = build_model(config, transformer_config(config), build_balance(config))
        tokens = held_out(prefix)
        return outputs_in_model(chunk, tokens), output_of_random(chunk, tokens.numel(), case.seed)


def trained(case: Case, prefix: str) -> tuple[list[Output], float]:
    """Train; return what the blocks put out on held-out text, and the held-out loss."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        alone(case.config(prefix, folder)) as config,
    ):
        from megatron_hyperp.data.tokenizer import load_tokenizer
        from megatron_hyperp.training.loop import Trainer

        trainer = Trainer(config, load_tokenizer(f"null:{VOCABULARY}"), None)
        trainer.train()
        loss = trainer.evaluate()
        trainer.close_reports()
        assert loss is not None
        return outputs_in_model(trainer.chunks[0], held_out(prefix)), loss


def write_corpus(folder: Path) -> str:
    """Write Python's own sources, as bytes, in Megatron's format; return the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / "python")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for path in python_corpus_paths(max_bytes=CORPUS_BYTES, max_file_bytes=50_000):
        document = np.append(np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64), VOCABULARY - 1)
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix


def held_out(prefix: str) -> torch.Tensor:
    """Return the corpus' last tokens, [sequences, length], which are all of documents held out from training."""
    tokens = np.fromfile(prefix + ".bin", dtype=np.uint16)[-MEASURED_SEQUENCES * LENGTH :]
    return torch.from_numpy(tokens.astype(np.int64)).view(-1, LENGTH)
