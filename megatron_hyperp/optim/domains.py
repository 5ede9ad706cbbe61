"""Which ranks hold which parameters: the domains of data parallelism, with their process groups and owners."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_hyperp.optim.groups import Groups
from megatron_hyperp.optim.ownership import Piece, Plan, partial_matrices, plan_ownership
from megatron_hyperp.optim.routing import Route
from megatron_hyperp.optim.tensor_parallel import machine
from megatron_hyperp.parameters import is_expert


@dataclass(frozen=True, slots=True)
class Domain:
    """Parameters that the same ranks replicate: all but the experts, or the experts.

    Attributes:
        routes: of this rank's part of the model.
        plan: which data-parallel rank owns what.
        tensor: ranks that share sharded matrices.
        data: ranks that replicate them.
        both: the ranks that hold parts of them, over which norms are summed.
        team: ranks that share this rank's heavy matrices, tensor- and data-parallel ones together; None without teams.
    """

    routes: list[Route]
    plan: Plan
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    both: dist.ProcessGroup
    team: dist.ProcessGroup | None

    @property
    def mine(self) -> list[Piece]:
        """What this rank owns."""
        return [piece for piece in self.plan.pieces if piece.rank == self.data.rank()]

    def groups_of_sums(self, *, on_sphere: bool) -> list[dist.ProcessGroup]:
        """Return the groups over which numbers of partial matrices are summed, one after the other.

        Off the sphere experts are cut over data-parallel ranks; on it only those whose rule is elementwise.
        """
        cut = not on_sphere or any(entry.rule.on_sphere and not entry.rule.needs_matrix for entry in self.routes)
        return [self.tensor, self.data] if cut and self.both is self.tensor else [self.both]

    def places(self, *, on_sphere: bool) -> dict[int, int]:
        """Number the matrices, by route, on the sphere or off it, of which a rank holds only a part."""
        partial = partial_matrices(self.routes, self.plan, self.tensor.size(), on_sphere=on_sphere)
        return {index: place for place, index in enumerate(partial)}


def _domain(
    routes: list[Route],
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup],
    strategy: str,
    *,
    loads: list[float] | None,
    teams: bool,
) -> Domain:
    tensor, data, both = groups
    plan = plan_ownership(
        routes,
        data.size(),
        machine(),
        tensor_parallel_size=tensor.size(),
        strategy=strategy,
        loads=loads,
        teams=teams,
    )
    return Domain(routes, plan, tensor, data, both, _team_group(data, both, plan.team) if plan.team > 1 else None)


def _data_ranks(both: dist.ProcessGroup, data: dist.ProcessGroup) -> dict[int, int]:
    """Data-parallel rank of each rank of a pipeline stage: Megatron-Core numbers tensor-parallel ranks first."""
    tensor = both.size() // data.size()
    result = {rank: index // tensor for index, rank in enumerate(sorted(dist.get_process_group_ranks(both)))}
    assert result[dist.get_rank()] == data.rank()
    return result


def _team_group(data: dist.ProcessGroup, both: dist.ProcessGroup, team: int) -> dist.ProcessGroup:
    """Create the group of this rank's team: consecutive data-parallel ranks with their tensor-parallel ranks."""
    own = data.rank() // team
    members = [rank for rank, data_rank in _data_ranks(both, data).items() if data_rank // team == own]
    # Only the members meet; other teams make theirs at the same time.
    group = dist.new_group(members, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def domains_of(routes: list[Route], strategy: str, groups: Groups) -> list[Domain]:
    """Plan the ownership of all but the experts, then of the experts on top of that work."""
    dense = [entry for entry in routes if not is_expert(entry.parameter)]
    experts = [entry for entry in routes if is_expert(entry.parameter)]
    domains = [_domain(dense, (groups.tensor, groups.data, groups.both), strategy, loads=None, teams=True)]
    if experts:
        data_ranks, dense_loads = _data_ranks(groups.both, groups.data), domains[0].plan.loads
        loads = [dense_loads[data_ranks[rank]] for rank in dist.get_process_group_ranks(groups.expert_data)]
        # Of experts only tensor-parallel ranks hold parts: there are many, so none is shared by a team.
        shared = (groups.expert_tensor, groups.expert_data, groups.expert_tensor)
        domains.append(_domain(experts, shared, strategy, loads=loads, teams=False))
    return domains
