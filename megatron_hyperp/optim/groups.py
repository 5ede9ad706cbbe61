"""The process groups that the optimizer needs, from Megatron-Core's parallel state or a collection of its groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True, slots=True)
class Groups:
    """Ranks that hold the same parameters, or parts of the same matrices.

    Attributes:
        tensor: ranks that share the matrices of all but the experts.
        data: ranks that replicate those, context-parallel ones included.
        both: the two together: the ranks of a pipeline stage.
        expert_tensor: ranks that share each matrix of an expert.
        expert_data: ranks that replicate the experts.
    """

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    both: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    expert_data: dist.ProcessGroup

    @classmethod
    def of(cls, collection: Any = None) -> Groups:
        """Return the groups of a ``ProcessGroupCollection`` of Megatron-Core, or those of its parallel state.

        Args:
            collection: with the attributes tp, dp_cp, tp_dp_cp, expt_tp and expt_dp; None: the parallel state's.

        Raises:
            ValueError: the collection has not all of them.
        """
        if collection is None:
            return cls(
                parallel_state.get_tensor_model_parallel_group(),
                parallel_state.get_data_parallel_group(with_context_parallel=True),
                parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
                parallel_state.get_expert_tensor_parallel_group(),
                parallel_state.get_expert_data_parallel_group(),
            )
        names = ("tp", "dp_cp", "tp_dp_cp", "expt_tp", "expt_dp")
        missing = [name for name in names if getattr(collection, name, None) is None]
        if missing:
            raise ValueError(f"pg_collection has no group {', '.join(missing)}; the optimizer needs {', '.join(names)}")
        return cls(*(getattr(collection, name) for name in names))
