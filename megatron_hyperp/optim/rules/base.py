"""What an update rule is: its state, its direction, its scale. Everything else asks the rule.

A rule sees families: stacks [count, rows, columns] of what one rank holds of matrices with equal global shapes (of one
matrix, as [1, rows, columns], in the one-rank optimizers). The distributed step shards them, puts their results on
spheres, writes checkpoints and plans memory from what the rule declares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
import torch.distributed as dist

from megatron_hyperp.optim.fading import IDLE_STEPS
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.tensor_parallel import AUTO, orthogonalize_family
from megatron_hyperp.parameters import DISTINCT

if TYPE_CHECKING:
    from megatron_hyperp.optim.options import HyperPConfig


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One tensor of a rule's state, for each matrix.

    Attributes:
        shape: "matrix" for [rows, columns] as the weight has, "rows" for [rows, 1]: one number for each row.
        dtype: in which it is kept, and saved.

    Raises:
        ValueError: another shape.
    """

    shape: Literal["matrix", "rows"] = "matrix"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.shape not in ("matrix", "rows"):
            raise ValueError(f'the shape of a state entry is {self.shape!r}; allowed are "matrix" and "rows"')

    def of(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape for a matrix [rows, columns], or for a part of one."""
        return (rows, columns if self.shape == "matrix" else 1)

    def bytes(self, rows: int, columns: int) -> int:
        """Return the bytes for a matrix [rows, columns]."""
        height, width = self.of(rows, columns)
        return height * width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """How a stack that a rule gets is related to the whole matrices.

    Attributes:
        step: number of this step, from 1.
        rows: of the whole matrix.
        columns: of the whole matrix.
        partition_dim: the dimension that is split over ``group``, 0 or 1; REPLICATED where each of its ranks holds the
            whole matrix; DISTINCT where each has matrices of its own.
        group: ranks that share the matrices; None for one rank alone.
        strategy: how they share Newton-Schulz, see :func:`~megatron_hyperp.optim.tensor_parallel.orthogonalize_family`.
    """

    step: int
    rows: int
    columns: int
    partition_dim: int = DISTINCT
    group: dist.ProcessGroup | None = None
    strategy: str = AUTO

    def orthogonalize(self, stacked: torch.Tensor, newton_schulz: NewtonSchulz) -> torch.Tensor:
        """Orthogonalize the whole matrices; return this rank's part of them. A collective call of ``group``.

        Args:
            stacked: [count, rows, columns] of this rank.
            newton_schulz: schedule, precision and form.
        """
        if self.group is None or self.partition_dim == DISTINCT:
            return newton_schulz(stacked)
        return orthogonalize_family(
            stacked, newton_schulz, group=self.group, partition_dim=self.partition_dim, strategy=self.strategy
        )

    def sum(self, stacked: torch.Tensor, dim: Literal[0, 1]) -> torch.Tensor:
        """Sum over the rows (0) or the columns (1) of the whole matrices. A collective call of ``group``.

        Args:
            stacked: [count, rows, columns] of this rank; a dimension that is summed already has size 1, and is added
                over the ranks that split it alone.
            dim: the dimension of the matrices that is summed.

        Returns:
            The same with size 1 in that dimension, equal on all ranks that split it.
        """
        total = stacked.sum(dim=dim + 1, keepdim=True)
        if self.group is not None and self.partition_dim == dim and self.group.size() > 1:
            total = total.contiguous()
            dist.all_reduce(total, group=self.group)
        return total


class UpdateRule(ABC):
    """How one kind of parameter is updated; a frozen dataclass, so that equal rules form one family.

    Subclasses set the class attributes, say what state they keep, and give a direction. The step then is

        off the sphere:  W <- (1 - lr lambda) W - lr scale U
        on the sphere:   W <- (1 - lr lambda) W - lr (R/||U||) U, then W <- W R/||W||   (arXiv 2603.28743)

    Attributes:
        name: by which routing tables, checkpoints' configs and ``--optimizer-rule`` know it.
        on_sphere: whether its matrices keep the radius of their sphere.
        needs_matrix: whether an element's direction depends on more than that element's own gradients. A matrix of such
            a rule has one owner, or ranks that share it by :class:`Part`; other tensors are cut in equal runs of rows.
    """

    name: ClassVar[str]
    on_sphere: ClassVar[bool] = False
    needs_matrix: ClassVar[bool] = False

    @classmethod
    def of(cls, options: HyperPConfig, family: str) -> Self:
        """Return the rule for a run's options.

        Args:
            options: of the optimizer.
            family: of the parameter, one of :data:`~megatron_hyperp.parameters.GROUPS`.
        """
        del options, family
        return cls()

    @property
    def newton_schulz(self) -> NewtonSchulz | None:
        """What the rule orthogonalizes with, which costs most of its time; None if it does not."""
        return None

    @abstractmethod
    def state_entries(self) -> Mapping[str, StateEntry]:
        """Return the rule's state by name; zeros at the start."""

    def fading(self) -> tuple[str, float] | None:
        """Return with which momentum the steps of a matrix on its sphere fade while its gradient is exactly zero.

        Returns:
            Name of the state entry and its decay in a step, see :mod:`megatron_hyperp.optim.fading`; None: steps do not
            fade.
        """
        return None

    def entries(self) -> dict[str, StateEntry]:
        """Return all state that is kept: :meth:`state_entries`, and the steps without a gradient where steps fade."""
        idle = {IDLE_STEPS: StateEntry("rows")} if self.on_sphere and self.fading() is not None else {}
        return {**self.state_entries(), **idle}

    @abstractmethod
    def direction_(self, gradients: torch.Tensor, state: Mapping[str, torch.Tensor], part: Part) -> torch.Tensor:
        """Update the state in place and return the direction U; weights move along -U. Collectives go through ``part``.

        Args:
            gradients: fp32 [count, rows, columns], clipped; may be overwritten.
            state: by the names of :meth:`state_entries`, each stacked: [count, *entry.of(rows, columns)].
            part: how the stack is related to the whole matrices.
        """

    def scale(self, rows: int, columns: int) -> float:
        """Return the factor on the learning rate off the sphere, for a whole matrix [rows, columns]."""
        del rows, columns
        return 1.0

    def flops(self, rows: int, columns: int) -> float:
        """Return the FLOPs of the direction of a whole matrix, Newton-Schulz apart; 0 for elementwise work."""
        del rows, columns
        return 0.0

    def state_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of state for a matrix [rows, columns], or for a part of one."""
        return sum(entry.bytes(rows, columns) for entry in self.entries().values())
