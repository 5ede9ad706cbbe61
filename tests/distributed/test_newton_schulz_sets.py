"""Every set under every strategy of two ranks, against float64: spectra as of momenta, single rows and columns."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests import tolerances
from tests.run_distributed import run_distributed

STRATEGY_NAMES = ("gather", "all_to_all", "gram")
# Also one row and one column per rank.
SHAPES = ((16, 48), (48, 16), (2, 48), (48, 2))
SINGLE = (((1, 48), 1), ((48, 1), 0))


def errors(dtype: torch.dtype) -> list[tuple[str, float]]:
    """Relative errors of this rank's shards."""
    import torch.distributed as dist

    from benchmarks.newton_schulz.matrices import exact, with_spectrum
    from megatron_hyperp.coefficients import SETS
    from megatron_hyperp.optim.restarts import SPECTRA
    from megatron_hyperp.optim.tensor_parallel import orthogonalize_sharded

    dist.init_process_group("gloo")
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    cases = [(shape, split) for shape in SHAPES for split in (0, 1)] + list(SINGLE)
    result = []
    for name, (shape, split), strategy in itertools.product(SETS, cases, STRATEGY_NAMES):
        matrices = torch.stack([with_spectrum(spectrum, *shape) for spectrum in SPECTRA])
        matrices = torch.cat([matrices, torch.zeros(1, *shape, dtype=torch.float64)])
        right = torch.stack([exact(matrix, name) for matrix in matrices]).chunk(ranks, dim=split + 1)[rank]
        shards = list(matrices.float().chunk(ranks, dim=split + 1)[rank])
        found = torch.stack(
            orthogonalize_sharded(
                shards,
                group=group,
                partition_dim=split,
                strategy=strategy,
                ns_steps=SETS[name].steps,
                coefficients=name,
                dtype=dtype,
            )
        ).double()
        assert not found[-1].any()
        result.append((f"{name} {shape} {split} {strategy}", float((found - right).norm() / right.norm())))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_set_under_every_strategy(dtype: torch.dtype) -> None:
    for results in run_distributed(errors, 2, dtype):
        assert len(results) == 6 * (2 * len(SHAPES) + len(SINGLE)) * len(STRATEGY_NAMES)
        for case, error in results:
            assert error < tolerances.NEWTON_SCHULZ_ON_SPECTRA[dtype], case
