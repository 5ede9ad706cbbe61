"""What a Megatron-Core parameter is: its name in the whole model, its role, its global shape, the parts of it."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# Partition dimensions besides 0 and 1: every tensor-parallel rank holds the same matrix, or one of its own.
REPLICATED = -1
DISTINCT = -2

# Roles by name; tests check that every parameter of every model has exactly one.
ROLES: dict[str, tuple[str, ...]] = {
    "embedding": ("*embedding.word_embeddings.weight",),
    "output": ("*output_layer.weight",),
    "hidden": (
        "*.self_attention.linear_qkv.weight",
        "*.self_attention.linear_proj.weight",
        "*.mlp.linear_fc1.weight",
        "*.mlp.linear_fc2.weight",
        "*.mlp.shared_experts.linear_fc[12].weight",
        "*.mlp.experts.local_experts.*.linear_fc[12].weight",
    ),
    "router": ("*.mlp.router.weight",),
    "vector": ("*norm.weight", "*.layer_norm_weight", "*.bias"),
}

# Groups whose norms and angles are logged, over all layers.
GROUPS = ("embedding", "output", "attention", "mlp", "experts", "router", "vectors")
# Groups of matrices inside layers.
MATRIX_GROUPS = ("attention", "mlp", "experts", "router")
# Roles whose updates are steps of whole matrices; an embedding is a table of vectors.
MATRIX_ROLES = ("hidden", "router", "output")

# Of a grouped layer of experts: experts.linear_fc1.weight3
_GROUPED = re.compile(r"(\.experts)\.(linear_fc[12])\.weight(\d+)$")


def named_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield a pipeline chunk's parameters, wrappers' prefixes dropped.

    Layers are numbered from 0 over the whole model, and a layer's experts over all expert-parallel ranks. A matrix of
    an expert has the name that Megatron-Core's ``SequentialMLP`` gives it, although grouped experts keep it otherwise.
    """
    numbers: dict[str, int] = {}
    for name, module in chunk.named_modules():
        if re.search(r"\.layers\.\d+$", name) and hasattr(module, "layer_number"):
            numbers[name] = module.layer_number - 1
        for local, number in enumerate(getattr(module, "local_expert_indices", ())):
            numbers[f"{name}.experts.local_experts.{local}"] = number
    for name, parameter in chunk.named_parameters():
        words = _GROUPED.sub(r"\1.local_experts.\3.\2.weight", name).split(".")
        # The prefix in the chunk's own numbering says the number in the whole model.
        whole = [str(numbers.get(".".join(words[: end + 1]), word)) for end, word in enumerate(words)]
        yield re.sub(r"^(module\.)+", "", ".".join(whole)), parameter


EXPERT = ".experts."


def mark_expert_parameters(chunk: torch.nn.Module, expert_tensor_parallel_size: int) -> None:
    """Mark experts' parameters as such, and how their matrices are split, which Megatron-Core does on CPU alone.

    Megatron-Core marks them only under expert parallelism. Without it, too, tensor-parallel ranks hold different tokens
    for whole copies of an expert, so that its gradients are summed over other ranks than those of the other weights.
    """
    for name, parameter in chunk.named_parameters():
        if EXPERT in name:
            split = expert_tensor_parallel_size > 1 and parameter.ndim == 2
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
            parameter.partition_dim = (0 if "linear_fc1" in name else 1) if split else REPLICATED  # type: ignore[attr-defined]


def role_of(name: str, parameter: torch.Tensor) -> str:
    """Return the one role of a parameter.

    Raises:
        ValueError: no role matches it, or more than one, or its shape does not fit.
    """
    # With tied embeddings the last pipeline stage holds a copy of the embedding under the output layer's name.
    if getattr(parameter, "shared_embedding", False):
        return "embedding"
    role = role_by_name(name, f" of shape {tuple(parameter.shape)}")
    if (parameter.ndim == 2) == (role == "vector"):
        raise ValueError(f"the parameter {name} has the role {role} but the shape {tuple(parameter.shape)}")
    return role


def role_of_any(name: str, parameter: torch.Tensor) -> str:
    """Return the role of a parameter of any Megatron-Core model: by name where :data:`ROLES` knows it, else by shape.

    A matrix is an embedding or output layer if Megatron-Core marks it so (``is_embedding_or_output_parameter``) or its
    name says so, a router by name, and hidden otherwise. Whatever is no matrix is a "vector".
    """
    try:
        return role_of(name, parameter)
    except ValueError:
        if parameter.ndim != 2:
            return "vector"
    if "output_layer" in name:
        return "output"
    if getattr(parameter, "is_embedding_or_output_parameter", False) or "embedding" in name:
        return "embedding"
    return "router" if name.endswith("router.weight") else "hidden"


def role_by_name(name: str, more: str = "") -> str:
    """Return the one role of a name.

    Args:
        name: of a parameter, in the whole model.
        more: what else the error says of it.

    Raises:
        ValueError: no role matches it, or more than one.
    """
    found = [role for role, patterns in ROLES.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if len(found) != 1:
        what = "no role" if not found else f"{len(found)} roles ({', '.join(found)})"
        raise ValueError(f"{what} for the parameter {name}{more}; see ROLES in parameters.py")
    return found[0]


def group_of(name: str, role: str) -> str:
    """Return the group, one of :data:`GROUPS`, of a parameter; shared experts are the MLP's."""
    if role == "vector":
        return "vectors"
    if role != "hidden":
        return role
    if "attention." in name:
        return "attention"
    return "experts" if ".experts." in name else "mlp"


def is_rounded(name: str, parameter: torch.Tensor) -> bool:
    """Whether a layer that runs in FP8 rounds the parameter: matrices of linear layers, not gains fused with them."""
    return "linear_" in name and parameter.ndim == 2


def partition_dim(parameter: torch.Tensor) -> int:
    """Return the dimension that is split over the tensor-parallel ranks, or -1 if each holds the whole parameter."""
    return int(parameter.partition_dim) if getattr(parameter, "tensor_model_parallel", False) else REPLICATED  # type: ignore[attr-defined]


def global_shape(parameter: torch.Tensor, tensor_parallel_size: int) -> tuple[int, ...]:
    """Return the shape of the parameter of which this rank holds a part."""
    split = partition_dim(parameter)
    return tuple(size * tensor_parallel_size if dim == split else size for dim, size in enumerate(parameter.shape))


def is_expert(parameter: torch.Tensor) -> bool:
    """Whether the parameter belongs to an expert, which Megatron-Core reduces over the expert-data-parallel group."""
    return not getattr(parameter, "allreduce", True)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a rank's parameter [d_out, d_in]: the same rows of each of several equal groups of rows.

    The groups are the key-value groups of a fused QKV weight; anywhere else there is one. A vector counts as [n, 1],
    and what has more than two dimensions as [n, the rest].

    Attributes:
        groups: equal groups into which the parameter's rows are cut.
        start: first row, within each group.
        rows: rows, within each group.
        column: first column.
        columns: columns.
    """

    groups: int
    start: int
    rows: int
    column: int
    columns: int

    @classmethod
    def whole(cls, parameter: torch.Tensor) -> Block:
        """The whole parameter."""
        rows = parameter.shape[0]
        return cls(1, 0, rows, 0, parameter.numel() // rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that the block is."""
        return self.groups * self.rows, self.columns

    @property
    def numel(self) -> int:
        """Elements."""
        return self.groups * self.rows * self.columns

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the block of a contiguous tensor of the parameter's shape, as a view [groups, rows, columns]."""
        grouped = tensor.view(self.groups, len(tensor) // self.groups, -1)
        rows = grouped.narrow(1, self.start, self.rows)
        return rows.narrow(2, self.column, self.columns)

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the block as a matrix of :attr:`shape`; a view where memory allows it, else a copy."""
        return self.of(tensor).reshape(self.shape)

    def cut(self, dim: int, parts: int) -> list[Block]:
        """Cut the block along its rows (0) or columns (1) into parts of equal size; the last ones may lack some.

        Empty parts are left out.
        """
        return list(_parts(self, dim, parts))


# Large jobs cut the same few shapes by the thousand, into a thousand parts.
@functools.lru_cache(maxsize=256)
def _parts(block: Block, dim: int, parts: int) -> tuple[Block, ...]:
    length = block.rows if dim == 0 else block.columns
    size = -(-length // parts)
    result = []
    for low in range(0, length, size):
        taken = min(size, length - low)
        if dim == 0:
            result.append(replace(block, start=block.start + low, rows=taken))
        else:
            result.append(replace(block, column=block.column + low, columns=taken))
    return tuple(result)
