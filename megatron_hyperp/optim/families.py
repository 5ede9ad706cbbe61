"""What a rank owns, in batches: pieces of one rule and shape are stacked and updated as one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_hyperp.optim.domains import Domain
from megatron_hyperp.optim.ownership import Piece
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.parameters import REPLICATED, Block

STATES = {
    "muonh": ("momentum_buffer",),
    "muon": ("momentum_buffer",),
    "adamh": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}


@dataclass(slots=True)
class Family:
    """What this rank owns of parameters that are updated as one batch.

    Attributes:
        routes: their rules, all alike but for the names.
        blocks: the part of each that this rank owns.
        domain: where they belong.
        share_group: ranks that share the matrices' Newton-Schulz.
        share_dim: the dimension along which they are split over those, or REPLICATED or DISTINCT.
        master: fp32 weights [count, rows, columns].
        state: optimizer state by name, each of the master's shape.
        radii: [count] float64; empty off the sphere.
        places: [count], in the domain's sum of norms; empty where this rank holds whole matrices.
        group: the ``param_groups`` entry with its learning rate and weight decay.
    """

    routes: list[Route]
    blocks: list[Block]
    domain: Domain
    share_group: dist.ProcessGroup
    share_dim: int
    master: torch.Tensor
    state: dict[str, torch.Tensor]
    radii: torch.Tensor
    places: torch.Tensor
    group: dict[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """The update rule of all its parameters."""
        return self.routes[0].rule

    @property
    def counts(self) -> bool:
        """Whether this rank counts it in global sums: of equal copies on tensor-parallel ranks, the first."""
        return self.routes[0].partition_dim != REPLICATED or self.domain.tensor.rank() == 0

    def weights(self) -> list[torch.Tensor]:
        """Views of the model's tensors, [groups, rows, columns] each."""
        pairs = zip(self.routes, self.blocks, strict=True)
        return [block.of(entry.parameter.detach()) for entry, block in pairs]

    def gradients(self) -> torch.Tensor:
        """A copy of the reduced gradients, fp32 [count, rows, columns]."""
        pairs = zip(self.routes, self.blocks, strict=True)
        return torch.stack([block.matrix(entry.parameter.main_grad) for entry, block in pairs])  # type: ignore[attr-defined]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Master and state by name."""
        return {"master": self.master, **self.state}


def families_of(domain: Domain, momentum_dtype: torch.dtype) -> list[Family]:
    """Group what this rank owns of a domain into families; masters are still zero.

    Families that several ranks share come in the same order on all of those.

    Args:
        domain: the parameters.
        momentum_dtype: precision of Muon's momentum.
    """
    families: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in domain.mine:
        entry = domain.routes[piece.route]
        shared = getattr(entry.parameter, "shared", False)
        fate = (entry.rule, entry.role, entry.lr_mult, entry.decays, shared)
        shape = (entry.shape, entry.partition_dim, piece.block.shape, piece.team_dim)
        families.setdefault((fate, shape), []).append(piece)
    return [_family(domain, pieces, momentum_dtype) for pieces in families.values()]


def _family(domain: Domain, pieces: list[Piece], momentum_dtype: torch.dtype) -> Family:
    routes, blocks = [domain.routes[piece.route] for piece in pieces], [piece.block for piece in pieces]
    first, team_dim = routes[0], pieces[0].team_dim
    home, places = first.parameter.device, domain.places()
    master = torch.zeros((len(pieces), *blocks[0].shape), device=home)
    # State is created here and now: made at the first step it could differ between ranks and hang a checkpoint.
    state = {
        name: torch.zeros_like(master, dtype=momentum_dtype if name == "momentum_buffer" else torch.float32)
        for name in STATES[first.rule]
    }
    radii = [entry.radius for entry in routes if entry.radius is not None]
    share_group = domain.tensor if team_dim is None else domain.team
    assert share_group is not None
    return Family(
        routes,
        blocks,
        domain,
        share_group,
        first.partition_dim if team_dim is None else team_dim,
        master,
        state,
        torch.tensor(radii, dtype=torch.float64, device=home),
        torch.tensor([places[piece.route] for piece in pieces if piece.route in places], dtype=torch.long, device=home),
    )
