"""Newton-Schulz over tensor-parallel ranks: exact in every case, few collectives, the choice of a strategy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.products import symmetric_product
from megatron_hyperp.optim.tensor_parallel import MACHINES, STRATEGIES, Cost, Job, choose, costs, describe
from tests import tolerances
from tests.run_distributed import run_distributed

SHAPES = ((64, 32), (32, 64), (32, 32), (8, 4), (48, 8))
COUNTS = (0, 1, 3, 8)
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce")
Results = list[tuple[tuple[Any, ...], float, int]]
# Powers of two on integers up to 1,000: denormal, small, and up to 1e38.
SIZES = (-149, -130, -80, 60, 117)


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return wrapper


def difference(parts: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative difference of a family in the Frobenius norm; infinite if a matrix that should be zero is not."""
    if not parts:
        return 0.0
    if any(bool(part.any()) for part, value in zip(parts, expected, strict=True) if not value.any()):
        return float("inf")
    return float((torch.stack(parts) - torch.stack(expected)).norm() / torch.stack(expected).norm())


def integers(shape: tuple[int, int], count: int) -> torch.Tensor:
    """Matrices that every power of two of :data:`SIZES` scales exactly."""
    random = torch.Generator().manual_seed(count)
    return torch.randint(-1000, 1000, (count, *shape), generator=random).float()


def assert_any_size(group: Any, dtype: torch.dtype) -> None:
    """Matrices of any size, shards of zeros and shards much smaller than the others give what normal matrices give."""
    import torch.distributed as dist

    from megatron_hyperp.optim.tensor_parallel import orthogonalize_sharded

    rank, ranks = dist.get_rank(), dist.get_world_size()
    tolerance = 2 * (tolerances.SHARDED_NEWTON_SCHULZ if dtype == torch.float32 else tolerances.NEWTON_SCHULZ_FP16)
    for strategy, shape, split in itertools.product(STRATEGIES, ((64, 32), (32, 64)), (0, 1)):

        def run(whole: torch.Tensor, strategy: str = strategy, split: int = split) -> torch.Tensor:
            shards = list(whole.chunk(ranks, dim=split + 1)[rank])
            options: dict[str, Any] = {"partition_dim": split, "strategy": strategy, "dtype": dtype}
            return torch.stack(orthogonalize_sharded(shards, group=group, **options))

        base = integers(shape, 3)
        base[1] = 0
        expected = run(base)
        assert bool(expected.isfinite().all())
        for size in SIZES:
            # In two factors, of which each is a number in fp32.
            scaled = base * 2.0 ** (size // 2) * 2.0 ** (size - size // 2)
            assert torch.equal(run(scaled), expected), (strategy, shape, split, size)
        # Matrices whose first half is 0, 1e-9 and 1e-30 of the other.
        parts = base[[0, 0, 0]].chunk(2, dim=split + 1)
        uneven = torch.cat([parts[0] * torch.tensor([0.0, 1e-9, 1e-30])[:, None, None], parts[1]], dim=split + 1)
        whole = NewtonSchulz(dtype=torch.float32)(uneven).chunk(ranks, dim=split + 1)[rank]
        error = float((run(uneven) - whole).norm() / expected.norm())
        assert error < tolerance, (strategy, shape, split, error)


def sharded_newton_schulz(dtype: torch.dtype) -> Results:
    """Compare sharded with whole matrices for every case; return each one's relative difference and collectives."""
    import torch.distributed as dist

    from megatron_hyperp.optim.tensor_parallel import orthogonalize_sharded

    dist.init_process_group("gloo")
    calls: list[str] = []
    for name in COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name), calls))
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    reference = NewtonSchulz(dtype=torch.float32)
    results: Results = []
    for strategy in ("auto", *STRATEGIES):
        for shape in SHAPES:
            for split in (0, 1, -1):
                for count in COUNTS:
                    random = torch.Generator().manual_seed(count)
                    # Momenta are small; one matrix of zeros must harm no other.
                    matrices = [1e-4 * torch.randn(shape, generator=random) for _ in range(count)]
                    matrices = [torch.zeros_like(m) if index == 2 else m for index, m in enumerate(matrices)]
                    shards = [m if split < 0 else m.chunk(ranks, dim=split)[rank] for m in matrices]
                    calls.clear()
                    parts = orthogonalize_sharded(
                        shards, group=group, partition_dim=split, strategy=strategy, dtype=dtype
                    )
                    assert len(parts) == count
                    whole = [reference(matrix) for matrix in matrices]
                    expected = [m if split < 0 else m.chunk(ranks, dim=split)[rank] for m in whole]
                    results.append(((strategy, shape, split, count), difference(parts, expected), len(calls)))
    assert_any_size(group, dtype)
    for bad, words in (({"partition_dim": 2}, "partition_dim is 2"), ({"strategy": "magic"}, "strategy is 'magic'")):
        with pytest.raises(ValueError, match=words):
            orthogonalize_sharded([torch.ones(2, 2)], **{"group": group, "partition_dim": 0, **bad})
    with pytest.raises(ValueError, match="one shape"):
        orthogonalize_sharded([torch.ones(2, 2), torch.ones(2, 4)], group=group, partition_dim=0)
    if ranks > 1:
        with pytest.raises(ValueError, match="use all_to_all"):
            orthogonalize_sharded([torch.ones(2, 9)], group=group, partition_dim=0, strategy="gram")
        with pytest.raises(ValueError, match="bf16"):
            orthogonalize_sharded(
                [torch.ones(2, 2)], group=group, partition_dim=0, strategy="gram", dtype=torch.bfloat16
            )
    return results


def most_collectives(strategy: str, shape: tuple[int, int], split: int) -> int:
    """Gram: an all-reduce of the largest elements, then a reduce-scatter and an all-gather on each side of the restart.

    From short sides also an exchange each way.
    """
    short = split >= 0 and shape[split] < shape[1 - split]
    return {"gather": 1, "all_to_all": 2, "gram": 5 + 2 * short, "auto": 5 + 2 * short}[strategy]


@pytest.mark.parametrize(
    ("world_size", "dtype"),
    [(1, torch.float32), (2, torch.float32), (4, torch.float32), (2, torch.float16)],
    ids=["1", "2", "4", "2 fp16"],
)
def test_every_strategy_equals_one_rank(world_size: int, dtype: torch.dtype) -> None:
    largest = tolerances.SHARDED_NEWTON_SCHULZ if dtype == torch.float32 else tolerances.NEWTON_SCHULZ_FP16
    for results in run_distributed(sharded_newton_schulz, world_size, dtype):
        assert len(results) == (1 + len(STRATEGIES)) * len(SHAPES) * 3 * len(COUNTS)
        for (strategy, shape, split, count), error, collectives in results:
            # A square Gaussian matrix has singular values near 0, whose rounding the Gram matrix squares; auto never
            # takes the Gram form there, since it needs more FLOPs.
            slack = 2 if shape[0] == shape[1] and strategy == "gram" else 1
            assert error < slack * largest, (strategy, shape, split, count)
            most = most_collectives(strategy, shape, split) if world_size > 1 and count else 0
            assert collectives <= most, (strategy, shape, split, count)


def test_the_cost_model_counts_what_the_design_says() -> None:
    # Below 128 rows symmetric products are whole on every device.
    ns, n, m, count, p = NewtonSchulz(dtype=torch.float32), 96, 384, 8, 4
    predicted = costs(Job(count, n, m, 1, p), ns)
    gram_flops = 8 * n * n * m + 28 * n**3
    assert ns.form_of(n, m) == "gram"
    assert ns.flops(n, m, "standard") == ns.flops(m, n, "standard") == 20 * n * n * m + 10 * n**3
    assert ns.flops(n, m, "gram") == gram_flops
    assert NewtonSchulz(dtype=torch.float32, steps=2).flops(n, m, "gram") == 4 * n * n * m + 10 * n**3
    assert predicted["gather"].flops == count * gram_flops
    assert predicted["all_to_all"].flops == count * gram_flops / p
    assert predicted["gram"].flops == count * gram_flops / p
    assert predicted["gather"].sent == 4 * count * n * m * 3 / 4
    assert predicted["all_to_all"].sent == 2 * 4 * count * n * m * 3 / 4 / p
    assert predicted["gram"].sent == (2 * 2 * 4 * count * n * n + 2 * 4 * count) * 3 / 4
    assert [predicted[name].collectives for name in STRATEGIES] == [1, 2, 5]
    # One matrix for four ranks: all_to_all leaves three idle, gram shares the long products.
    assert costs(Job(1, n, m, 1, p), ns)["all_to_all"].flops == gram_flops
    assert costs(Job(1, n, m, 1, p), ns)["gram"].flops == 8 * n * n * m / p + 28 * n**3


@pytest.mark.parametrize("size", [64, 130, 256, 600])
def test_symmetric_products_equal_plain_ones(size: int) -> None:
    x = torch.randn(2, size, 3 * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = symmetric_product(x, x.mT)
    assert torch.allclose(gram, x @ x.mT)
    square = symmetric_product(gram, gram, gram, beta=0.5, alpha=-2.0)
    assert torch.allclose(square, 0.5 * gram - 2.0 * gram @ gram)


def test_form_by_flops() -> None:
    ns = NewtonSchulz(dtype=torch.float32)
    assert [ns.form_of(100, columns) for columns in (100, 149, 151, 400)] == ["standard"] * 2 + ["gram"] * 2
    assert NewtonSchulz(dtype=torch.bfloat16).form_of(100, 400) == "standard"
    assert NewtonSchulz(dtype=torch.float16).form_of(400, 100) == "gram"
    assert NewtonSchulz(dtype=torch.float32, form="standard").form_of(100, 400) == "standard"
    with pytest.raises(ValueError, match="bf16"):
        NewtonSchulz(form="gram")
    with pytest.raises(ValueError, match="form is 'cubic'"):
        NewtonSchulz(form="cubic")


def test_choice_follows_the_machine() -> None:
    ns, job = NewtonSchulz(dtype=torch.float32), Job(8, 512, 2048, 1, 4)
    machine = MACHINES["cpu"]
    assert choose(job, ns, machine) == "all_to_all"
    assert choose(Job(1, 512, 2048, 1, 4), ns, machine) == "gram"
    assert "gram" not in costs(job, NewtonSchulz(dtype=torch.bfloat16))
    assert "gram" not in costs(Job(8, 512, 2049, 0, 4), ns)
    # One small matrix is not worth two collectives.
    assert choose(Job(1, 8, 16, 1, 2), ns, machine) == "gather"
    assert choose(Job(64, 64, 256, -1, 4), ns, machine) in ("gather", "all_to_all")
    assert Cost(2e9, 3e8, 0.0, 5).seconds(machine) == pytest.approx(
        2e9 / machine.flops + 3e8 / machine.bytes_per_s + 5 * machine.latency
    )
    table = describe([job, Job(2, 8, 16, -1, 4)], ns, machine, "auto").splitlines()
    assert table[1].split()[:8] == ["8", "of", "512", "x", "2048", "columns", "gram", "all_to_all"]
    assert table[2].split()[5] == "-"
