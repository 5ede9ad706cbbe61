"""Pipeline schedules of Megatron-Core."""

from __future__ import annotations

from packaging.version import Version

from megatron_hyperp.megatron_compat.versions import megatron_core_version

# Of megatron.core.pipeline_parallel.schedules: the interleaved one waits for a send before it frees what is sent.
WAITS_FOR_SENDS = Version("0.18.2")


def frees_pipeline_outputs(virtual_stages: int, version: Version = megatron_core_version) -> bool:
    """Whether a stage's output may be freed as soon as its send has started, under CUDA.

    The schedule without interleaving waits for its sends. The interleaved one overlaps sends with computation, and
    before 0.18.2 frees an output whose send is still in progress: the next stage may receive what has since been
    written there.

    Args:
        virtual_stages: model chunks of a rank.
        version: of Megatron-Core.
    """
    return virtual_stages == 1 or version >= WAITS_FOR_SENDS
