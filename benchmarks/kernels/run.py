"""What optional kernels gain: each in turns with what it replaces, medians, and bytes kept for the backward pass."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.corpus import write_corpus
from benchmarks.turns import in_turns
from megatron_hyperp import device
from megatron_hyperp.arguments import load_yaml
from megatron_hyperp.config import Config
from megatron_hyperp.errors import run_command
from megatron_hyperp.optim import sphere
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.rules.muon import momentum_

QUICKSTART = Path(__file__).resolve().parents[2] / "examples/configs/quickstart.yaml"
WARM_UPS = 2
# Sequence length, micro-batch; heads, groups, head size.
LENGTHS = ((256, 4), (1024, 1), (4096, 1))
HEADS = ((8, 4, 32), (8, 4, 128))
# Sequence length, micro-batch; the first is the quickstart's.
STEPS = ((128, 16), (1024, 2))
VOCABULARY = 32000
FAMILIES = ((4, 128, 512), (8, 512, 2048))

Case = Callable[[], Any]
# Its head, then rows as they are measured.
Table = Iterator[list[str]]


def clock() -> float:
    """Seconds; on CPU those that this process computes, for other jobs may run on the machine."""
    device.synchronize()
    return time.perf_counter() if device.has_cuda() else time.process_time()


def timed(case: Case) -> list[float]:
    """Return the seconds of a call."""
    started = clock()
    case()
    return [clock() - started]


def medians(cases: dict[str, Case], repeats: int) -> dict[str, float]:
    """Return the median seconds of each case; they take turns."""
    methods = {title: partial(timed, case) for title, case in cases.items()}
    return {title: value for title, (value,) in in_turns(methods, repeats, warm_ups=WARM_UPS).items()}


@contextmanager
def kept() -> Iterator[dict[int, int]]:
    """Collect, by address, the bytes of storages that forward passes keep."""
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Held, so that no other storage takes its address.
        alive.append(tensor)
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def bytes_kept(forward: Case) -> int:
    """Return what one forward pass keeps, inputs included."""
    with kept() as found:
        output = forward()
    del output
    return sum(found.values())


def ratios(title: list[str], seconds: dict[str, float], memory: dict[str, int]) -> list[str]:
    """A row: times of what is replaced and its replacement, and ratios of time and memory."""
    (_, old), (_, new) = seconds.items()
    before, after = memory.values()
    times = [f"{1e3 * old:.1f} ms", f"{1e3 * new:.1f} ms", f"{old / new:.2f}"]
    return [*title, *times, f"{before / 2**20:.1f} MiB", f"{after / 2**20:.1f} MiB", f"{before / after:.2f}"]


COLUMNS = ["before", "after", "faster", "kept before", "after", "less"]


def attention(dtype: torch.dtype, repeats: int) -> Table:
    """Forward and backward passes of core attention: Megatron-Core's and torch's."""
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hyperp.model.attention import SdpaAttention
    from megatron_hyperp.training.setup import initialize_megatron

    yield ["attention", "sequence", "batch", *COLUMNS]
    initialize_megatron(load_yaml(QUICKSTART).resolve(tokenizer_vocab_size=2048))
    for heads, groups, size in HEADS:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=heads * size,
            num_attention_heads=heads,
            num_query_groups=groups,
            attention_dropout=0.0,
            bf16=dtype == torch.bfloat16,
        )
        words = (config, 1, AttnMaskType.causal, "self")
        cores = {"local": DotProductAttention(*words), "sdpa": SdpaAttention(*words)}
        for length, batch in LENGTHS:
            shapes = [(length, batch, number, size) for number in (heads, groups, groups)]
            leaves = [torch.randn(shape, dtype=dtype, device=device.device(), requires_grad=True) for shape in shapes]
            forward = {title: _call(core, *leaves, None) for title, core in cores.items()}
            seconds = medians({title: _there_and_back(case) for title, case in forward.items()}, repeats)
            memory = {title: bytes_kept(case) for title, case in forward.items()}
            shape = [f"{heads} heads of {size} in {groups} groups", str(length), str(batch)]
            yield ratios(shape, seconds, memory)
    parallel_state.destroy_model_parallel()


def _call(function: Callable[..., Any], *words: Any) -> Case:
    return lambda: function(*words)


def _there_and_back(forward: Case) -> Case:
    return lambda: forward().float().sum().backward()


def step_config(length: int, size: int, folder: Path, prefix: str) -> Config:
    """Return the quickstart's config, unfused, with another sequence length, of as many tokens a step."""
    config = load_yaml(QUICKSTART)
    tokens = config.training.global_batch_size * config.model.seq_length
    config.model.seq_length, config.training.micro_batch_size = length, size
    config.training.global_batch_size, config.training.eval_interval = tokens // length, 0
    config.data.data_path, config.data.tokenizer_model = [prefix], "null:2048"
    config.logging.run_dir, config.logging.quiet = str(folder), True
    config.training.attention_backend = "local"
    return config.resolve(tokenizer_vocab_size=2048)


def step(repeats: int) -> Table:
    """Whole training steps, of which attention takes turns."""
    yield ["step: sequence", "micro-batch", *COLUMNS]
    for length, size in STEPS:
        with tempfile.TemporaryDirectory() as folder:
            yield _one_step(step_config(length, size, Path(folder), write_corpus(Path(folder), 2048)), repeats)


def _one_step(config: Config, repeats: int) -> list[str]:
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_hyperp.data.tokenizer import load_tokenizer
    from megatron_hyperp.model.attention import SdpaAttention
    from megatron_hyperp.training.loop import Trainer

    trainer = Trainer(config, load_tokenizer("null:2048"), None)
    batches = trainer._batches(trainer.train_set, 0)
    model: Any = trainer.chunks[0].module
    layers = [module.self_attention for module in model.modules() if hasattr(module, "self_attention")]
    cores: dict[str, list[torch.nn.Module]] = {
        "local": [layer.core_attention for layer in layers],
        "sdpa": [
            SdpaAttention(layer.config, 1, AttnMaskType.causal, "self", softmax_scale=config.model.softmax_scale)
            for layer in layers
        ],
    }

    def take(title: str) -> None:
        for layer, core in zip(layers, cores[title], strict=True):
            layer.core_attention = core

    def run(title: str) -> None:
        take(title)
        trainer._train_batch(batches)
        trainer.optimizer.step()

    seconds = medians({title: _call(run, title) for title in cores}, repeats)
    shape = (config.training.micro_batch_size, config.model.seq_length)
    tokens = torch.zeros(shape, dtype=torch.long, device=device.device())
    memory = {}
    for title in cores:
        take(title)
        memory[title] = bytes_kept(_call(model, tokens, tokens, None, None, tokens))
    trainer.close_reports()
    parallel_state.destroy_model_parallel()
    return ratios([str(shape[1]), str(shape[0])], seconds, memory)


def loss(dtype: torch.dtype, repeats: int) -> Table:
    """The cross entropy of 512 tokens, plain and fused, before Megatron-Core is adapted: it is compiled."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel()
    logits = torch.randn((512, 1, VOCABULARY), dtype=dtype, device=device.device())
    labels = torch.randint(VOCABULARY, (512, 1), device=device.device())
    leaf = logits.requires_grad_()
    # Both write into their input.
    forward: dict[str, Case] = {
        "plain": lambda: vocab_parallel_cross_entropy(leaf * 1, labels),
        "fused": lambda: fused_vocab_parallel_cross_entropy(leaf * 1, labels, dist.group.WORLD),
    }
    started = time.perf_counter()
    gradients: list[torch.Tensor] = []
    for case in forward.values():
        leaf.grad = None
        _there_and_back(case)()
        assert leaf.grad is not None
        gradients.append(leaf.grad.double())
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    compiled = time.perf_counter() - started
    seconds = medians({title: _there_and_back(case) for title, case in forward.items()}, repeats)
    memory = {title: bytes_kept(case) for title, case in forward.items()}
    parallel_state.destroy_model_parallel()
    yield ["loss: vocabulary", "error of gradients", "compiled in", *COLUMNS]
    yield ratios([str(VOCABULARY), f"{error:.1e}", f"{compiled:.0f} s"], seconds, memory)


def update(repeats: int) -> Table:
    """The elementwise part of a MuonH step, plain and compiled, beside the family's Newton-Schulz."""
    yield ["update of a family", "plain", "its inner products", "compiled", "faster", "Newton-Schulz", "saved of both"]
    for shape in FAMILIES:
        yield _one_update(shape, repeats)


def _one_update(shape: tuple[int, int, int], repeats: int) -> list[str]:
    weights, gradients, momenta, directions = (torch.randn(shape, device=device.device()) for _ in range(4))
    radii = weights.double().square().sum(dim=(1, 2)).sqrt()

    def elementwise() -> torch.Tensor:
        update = momentum_(momenta, gradients)
        products = sphere.inner_products(weights, directions)
        sphere.step_(weights, directions, products, radii=radii, lr=0.01)
        return update

    newton_schulz = NewtonSchulz(dtype=device.newton_schulz_dtype("auto"))
    cases = {
        "plain": elementwise,
        "inner products": _call(sphere.inner_products, weights, directions),
        "compiled": torch.compile(elementwise),
        "newton_schulz": _call(newton_schulz, gradients),
    }
    plain, inner, compiled, whole = medians(cases, repeats).values()
    times = [f"{1e3 * seconds:.2f} ms" for seconds in (plain, inner, compiled)]
    saved = [f"{plain / compiled:.2f}", f"{1e3 * whole:.1f} ms", f"{(plain - compiled) / (plain + whole):.1%}"]
    return [" x ".join(map(str, shape)), *times, *saved]


PARTS: dict[str, Callable[[torch.dtype, int], Table]] = {
    # What is compiled comes first: torch's compiler asks CUDA for its device, which adapt_megatron says is the CPU.
    "loss": loss,
    "update": lambda _, repeats: update(repeats),
    "attention": attention,
    "step": lambda _, repeats: step(repeats),
}


def main(argv: list[str]) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description="Time optional kernels and what they replace, in turns.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[all]")
    parser.add_argument("--bf16", action="store_true", help="attention and loss in bf16 [fp32]")
    parser.add_argument("--repeats", type=int, default=5, help="turns of which the medians count [5]")
    options = parser.parse_args(argv)
    device.init_process_group(1)
    for title in (part for part in PARTS if part in options.parts):
        if title in ("attention", "step"):
            device.adapt_megatron()
        for row in PARTS[title](torch.bfloat16 if options.bf16 else torch.float32, options.repeats):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
