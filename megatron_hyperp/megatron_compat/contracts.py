"""The names of Megatron-Core and torch that this package relies on: what for, and in which versions.

``python -m megatron_hyperp.megatron_compat.contracts`` prints the table of docs/megatron.md. tests/unit/
test_megatron_contract.py holds each name to its contract.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from megatron_hyperp.megatron_compat.versions import megatron_core_version


@dataclass(frozen=True, slots=True)
class Contract:
    """A name and what is relied on.

    Attributes:
        name: in full, with its module, and its class if it is a method.
        used_for: what for.
        passed: its first parameters, in order, without ``self``: those that are passed, or that it is called with
            where it is overridden here.
        keywords: further parameters, passed or received by keyword.
        first: version of Megatron-Core that has it first; None for all that are supported.
        until: version that no longer has it, or no longer this contract.
        confined: whether no module outside this package may import it. Private names are always confined.
    """

    name: str
    used_for: str
    passed: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    first: str | None = None
    until: str | None = None
    confined: bool = True

    @property
    def applies(self) -> bool:
        """Whether the installed Megatron-Core is one of those versions."""
        release = Version(megatron_core_version.base_version)
        after = self.first is None or release >= Version(self.first)
        return after and (self.until is None or release < Version(self.until))

    @property
    def versions(self) -> str:
        """Versions of Megatron-Core, in words."""
        bounds = [f"from {self.first}"] * (self.first is not None) + [f"before {self.until}"] * (self.until is not None)
        return ", ".join(bounds) or "all"

    def find(self) -> Any:
        """Return what the name stands for.

        Raises:
            AttributeError: it does not exist.
        """
        return find(self.name)

    def fault(self) -> str | None:
        """Say how the name's parameters differ from the contract; None if they do not."""
        if not self.passed and not self.keywords:
            return None
        found = [name for name in inspect.signature(self.find()).parameters if name != "self"]
        if tuple(found[: len(self.passed)]) != self.passed:
            return f"{self.name} takes ({', '.join(found)}), not first ({', '.join(self.passed)})"
        lacking = [name for name in self.keywords if name not in found]
        return f"{self.name} takes ({', '.join(found)}), not {', '.join(lacking)}" if lacking else None


def find(name: str) -> Any:
    """Return what a name with its module stands for.

    Raises:
        AttributeError: it does not exist.
    """
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


_CORE = "megatron.core"
_MOE = f"{_CORE}.transformer.moe"
_ROUTER = f"{_MOE}.router.TopKRouter"

CPU = (
    *(
        Contract(f"torch.cuda.{name}", "on CPU: replaced, there is one device, which runs in order", confined=False)
        for name in (
            "current_device",
            "synchronize",
            "empty_cache",
            "Stream",
            "Event",
            "current_stream",
            "default_stream",
            "stream",
        )
    ),
    *(
        Contract(f"torch.{name}.{method}", "on CPU: replaced, tensors are where they should be", confined=False)
        for name, method in (("Tensor", "record_stream"), ("Tensor", "cuda"), ("nn.Module", "cuda"))
    ),
    *(
        Contract(f"torch.{name}", 'on CPU: wrapped, `device="cuda"` is the CPU', confined=False)
        for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "as_tensor")
    ),
    *(
        Contract(f"torch.cuda.{name}", "on CPU: replaced, CUDA's random state is the CPU generator's", confined=False)
        for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "default_generators")
    ),
    *(
        Contract(f"{module}.{name}", "on CPU: replaced, seeds are set without starting CUDA")
        for module in ("torch.cuda", f"{_CORE}.tensor_parallel.random")
        for name in ("_lazy_init", "_lazy_call")
    ),
    *(
        Contract(
            f"{_MOE}.{module}.maybe_move_tensor_to_cpu",
            "on CPU: wrapped, split sizes of tokens are numbers",
            passed=("tensor", "as_numpy", "record_stream"),
        )
        for module in ("moe_utils", "token_dispatcher")
    ),
)

TORCH = (
    Contract("torch._foreach_mul_", "clips all gradients in one kernel"),
    Contract("torch.UntypedStorage._cdata", "finds views of one buffer, on the meta device too"),
    Contract(
        "torch.testing._internal.distributed.fake_pg.FakeStore", "process groups of a dry run, which move nothing"
    ),
)

EXPERTS = (
    Contract(
        f"{_MOE}.moe_utils.te_general_gemm",
        "0.16.1: defined as None without TransformerEngine, for the router's product",
        first="0.17",
    ),
    Contract(
        _ROUTER,
        "base of the router",
        passed=("config", "pg_collection"),
    ),
    Contract(f"{_ROUTER}.__init__", "passed on from the block", keywords=("is_mtp_layer",), first="0.17"),
    Contract(f"{_ROUTER}.routing", "overridden: SqrtGate", passed=("logits", "padding_mask")),
    Contract(f"{_ROUTER}.apply_z_loss", "overridden: a sum over tokens", passed=("logits", "padding_mask")),
    Contract(f"{_ROUTER}.is_aux_loss_enabled", "whether there is a load-balancing loss"),
    Contract(
        f"{_ROUTER}._apply_aux_loss", "load-balancing loss", passed=("probs", "scores_for_aux_loss", "routing_map")
    ),
    Contract(
        f"{_ROUTER}._apply_seq_aux_loss",
        "load-balancing loss per sequence",
        passed=("probs", "scores_for_aux_loss", "routing_map", "seq_length", "bsz"),
    ),
    Contract(
        f"{_ROUTER}._apply_global_aux_loss",
        "load-balancing loss over micro-batches",
        passed=("probs", "scores_for_aux_loss", "routing_map"),
    ),
    *(
        Contract(
            f"{_ROUTER}.attach_and_log_load_balancing_loss",
            "overridden: losses count all tokens of the group, and are not logged",
            passed=("activation", "aux_loss_coeff", "aux_loss", "aux_loss_name", "reduce_group"),
            keywords=(flag, "valid_token_count"),
            first=first,
            until=until,
        )
        for flag, first, until in (("reduce_group_has_dp", None, "0.18"), ("needs_dp_avg", "0.18", None))
    ),
    Contract(
        f"{_MOE}.moe_utils.compute_routing_scores_for_aux_loss",
        "probabilities for load-balancing losses",
        passed=("logits", "topk", "score_function"),
    ),
    Contract(
        f"{_MOE}.moe_utils.apply_router_token_dropping",
        "expert capacity",
        passed=("routing_probs", "routing_map"),
        keywords=("router_topk", "capacity_factor", "drop_policy", "pad_to_capacity"),
    ),
    Contract(f"{_MOE}.moe_utils.MoEAuxLossAutoScaler", "attaches losses to gates"),
    Contract(f"{_MOE}.moe_layer.MoELayer", "base of the block", passed=("config", "submodules")),
    Contract(
        f"{_MOE}.moe_layer.MoELayer.postprocess",
        "overridden: mix with the shared expert",
        passed=("output", "shared_expert_output"),
    ),
    Contract(
        f"{_MOE}.experts.TEGroupedMLP",
        "a rank's experts, without TransformerEngine too",
        passed=("num_local_experts", "config", "submodules", "pg_collection"),
    ),
    Contract(
        f"{_CORE}.transformer.mlp.MLPSubmodules",
        "layers of a rank's experts",
        keywords=("linear_fc1", "linear_fc2"),
        until="0.17",
    ),
    Contract(
        f"{_MOE}.experts.GroupedMLPSubmodules",
        "layers of a rank's experts",
        keywords=("linear_fc1", "linear_fc2"),
        first="0.17",
    ),
)

MODEL = (
    Contract(
        f"{_CORE}.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
        "layer specs, then changed",
        passed=("config",),
        keywords=("use_transformer_engine", "normalization", "vp_stage"),
    ),
    Contract(f"{_CORE}.transformer.spec_utils.ModuleSpec", "layer specs", passed=("module", "params", "submodules")),
    *(
        Contract(
            f"{_CORE}.tensor_parallel.layers.{kind}ParallelLinear._forward_impl",
            "overridden: emulated FP8",
            passed=("input", "weight"),
        )
        for kind in ("Column", "Row")
    ),
    Contract(
        f"{_CORE}.tensor_parallel.mappings._reduce",
        "wrapped: sums tensors that are not contiguous too; up to 0.18.2 it returns those unchanged",
        passed=("input_", "group"),
    ),
    Contract(
        f"{_CORE}.distributed.data_parallel_base._BaseDataParallel",
        "base of data parallelism, by which schedules know it",
        passed=("config", "module"),
    ),
    Contract(
        f"{_CORE}.pipeline_parallel.schedules.deallocate_output_tensor",
        "freed pipeline outputs on CUDA: not under the interleaved schedule before 0.18.2, which does not wait for the"
        " send",
        passed=("out", "deallocate_pipeline_outputs"),
    ),
)

_CHECKPOINTS = f"{_CORE}.dist_checkpointing"

CHECKPOINTS = (
    Contract(
        f"{_CHECKPOINTS}.save",
        "writes checkpoints",
        passed=("sharded_state_dict", "checkpoint_dir"),
        keywords=("async_sharded_save",),
    ),
    Contract(
        f"{_CHECKPOINTS}.save",
        "selects Megatron-Core's own writer instead of nvidia-resiliency-ext's",
        keywords=("async_strategy",),
        first="0.17",
    ),
    Contract(f"{_CHECKPOINTS}.load", "reads checkpoints", passed=("sharded_state_dict", "checkpoint_dir")),
    Contract(
        f"{_CHECKPOINTS}.utils.extract_sharded_base",
        "finds the state that all ranks share, for common.pt",
        passed=("sharded_state_dict",),
    ),
    Contract(
        f"{_CHECKPOINTS}.strategies.async_utils.AsyncCallsQueue",
        "asynchronous saves: forks a writer for each",
        keywords=("persistent",),
    ),
    Contract(
        f"{_CHECKPOINTS}.strategies.filesystem_async._results_queue",
        "replaced: writers report through a process that outlives signals",
    ),
)

CONTRACTS: tuple[Contract, ...] = (*MODEL, *EXPERTS, *CHECKPOINTS, *TORCH, *CPU)


def table() -> str:
    """Return the table of docs/megatron.md, without a newline at the end."""
    rows = [f"| `{contract.name}` | {contract.used_for} | {contract.versions} |" for contract in CONTRACTS]
    return "\n".join(["| name | used for | Megatron-Core |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
