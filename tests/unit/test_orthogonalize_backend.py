"""Backends of symmetric products: what is refused and how, and that a requested one computes every product.

The kernel itself runs in tests/gpu; here a stand-in with quack's signature computes on CPU.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.optimizer_step import run as benchmark
from megatron_hyperp import device
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.orthogonalize import NewtonSchulz, newton_schulz
from megatron_hyperp.optim.products import QUACK_PACKAGE, check_backend, gram_polynomial, symmetric_product
from tests.commands import run_here

ROOT = Path(__file__).parents[2]
OR_TORCH = "or take backend 'torch'"


class Kernel:
    """Stands for ``quack.gemm_interface.gemm_symmetric``: its arguments and demands, computed by PyTorch."""

    def __init__(self) -> None:
        self.products: list[tuple[int, ...]] = []

    def __call__(
        self,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        dynamic_scheduler: bool = False,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> torch.Tensor:
        assert isinstance(alpha, float)
        assert isinstance(beta, float)
        assert A.shape == B.mT.shape
        assert all(1 in tensor.stride()[1:] for tensor in (A, B))
        self.products.append(tuple(A.shape))
        return A @ B if C is None else torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


@pytest.fixture(autouse=True)
def _forget_backends() -> Iterator[None]:
    """Each test asks anew what can run: a backend found is remembered."""
    check_backend.cache_clear()
    yield
    check_backend.cache_clear()


def set_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(device, "compute_capability", lambda: capability)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A Hopper GPU with quack, as far as this package can see."""
    kernel, package, interface = Kernel(), ModuleType("quack"), ModuleType("quack.gemm_interface")
    interface.gemm_symmetric = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    set_capability(monkeypatch, (9, 0))
    return kernel


def matrices(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def refusal(dtype: torch.dtype = torch.bfloat16) -> str:
    """The one line with which ``backend="quack"`` is refused."""
    with pytest.raises(UsageError) as caught:
        NewtonSchulz(dtype=dtype, backend="quack")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_backend_is_refused() -> None:
    words = re.escape("backend is 'cublas'; known are torch, quack")
    with pytest.raises(ValueError, match=words):
        NewtonSchulz(backend="cublas")
    x = matrices(1, 8, 8)
    with pytest.raises(ValueError, match=words):
        symmetric_product(x, x.mT, backend="cublas")
    with pytest.raises(ValueError, match=words):
        gram_polynomial(x @ x.mT, [(1.0, 1.0, 1.0)], backend="cublas")
    with pytest.raises(ValueError, match=words):
        newton_schulz(x, backend="cublas")


def test_quack_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    set_capability(monkeypatch, None)
    assert (
        refusal() == f"backend 'quack' needs a CUDA device, and there is none here; run where there is one, {OR_TORCH}"
    )


def test_quack_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_capability(monkeypatch, (8, 6))
    needed = "needs compute capability 9.0 (H100) or more, this GPU has 8.6; run on a newer one"
    assert refusal() == f"backend 'quack' {needed}, {OR_TORCH}"


def test_quack_in_full_precision(kernel: Kernel) -> None:
    computes = "computes in fp16 or bf16, dtype is torch.float32; give one of those"
    assert refusal(torch.float32) == f"backend 'quack' {computes}, {OR_TORCH}"
    x = matrices(1, 8, 8)
    with pytest.raises(UsageError, match=r"dtype is torch\.float32"):
        symmetric_product(x, x.mT, backend="quack")
    assert not kernel.products


def test_quack_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    set_capability(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "quack", None)
    message = refusal()
    assert message.startswith("backend 'quack' needs the package quack-kernels (")
    assert message.endswith(f"); pip install '{QUACK_PACKAGE}', {OR_TORCH}")
    assert f'"kernels": ["{QUACK_PACKAGE}"]' in (ROOT / "setup.py").read_text()


def test_quack_of_another_api(kernel: Kernel) -> None:
    del sys.modules["quack.gemm_interface"].gemm_symmetric
    assert "cannot import name 'gemm_symmetric'" in refusal()


@pytest.mark.parametrize("shape", [(2, 20, 32), (2, 16, 30)])
def test_quack_takes_multiples_of_eight(kernel: Kernel, shape: tuple[int, ...]) -> None:
    x = matrices(*shape).bfloat16()
    words = re.escape(f"takes sizes that are multiples of 8, got the shape {shape}; take backend 'torch'")
    with pytest.raises(UsageError, match=words):
        symmetric_product(x, x.mT, backend="quack")


@pytest.mark.parametrize("shape", [(48, 96), (3, 48, 96), (3, 96, 48), (2, 64, 64)])
@pytest.mark.parametrize(("form", "dtype"), [("standard", torch.bfloat16), ("gram", torch.float16)])
def test_every_symmetric_product_is_the_backends(
    kernel: Kernel, form: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = matrices(*shape)
    plain = newton_schulz(x, dtype=dtype, form=form)
    assert not kernel.products
    ns = NewtonSchulz(dtype=dtype, form=form, backend="quack")
    # Below 128 rows PyTorch's products are whole as well, so the results are equal to the bit.
    assert torch.equal(ns(x), plain)
    count, (n, m) = (1 if x.ndim == 2 else len(x)), sorted(shape[-2:])
    long, square = (5, 5) if form == "standard" else (2, 5 + 9)
    expected = [(count, n, m)] * long + [(count, n, n)] * square
    assert sorted(kernel.products) == sorted(expected)
    assert torch.equal(newton_schulz(x, dtype=dtype, form=form, backend="quack"), plain)


def test_integer_factors_reach_the_kernel_as_floats(kernel: Kernel) -> None:
    x = matrices(2, 16, 16).bfloat16()
    gram = x @ x.mT
    result = symmetric_product(gram, gram, gram, beta=2, alpha=3, backend="quack")
    assert torch.equal(result, torch.baddbmm(gram, gram, gram, beta=2, alpha=3))


def test_flops_count_the_upper_triangle_of_tiles(kernel: Kernel) -> None:
    ns, n, m = NewtonSchulz(dtype=torch.float16, backend="quack"), 1024, 2048
    # Four tiles a side: 10 of 16 are computed.
    assert ns.flops(n, m, "standard") == 5 * round(2 * n * n * (m + n) * 10 / 16 + 2 * n * n * m)
    assert ns.polynomial_flops(n) == round(14 * 2 * n**3 * 10 / 16)
    assert ns.flops(256, m, "standard") == 20 * 256 * 256 * m + 10 * 256**3
    large = 256 * 1000
    assert ns.polynomial_flops(large) == pytest.approx(14 * large**3, rel=2e-3)


def test_benchmark_refuses_gpu_without_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    done = run_here(benchmark.main, "--gpu", capsys=capsys)
    error = "error: --gpu needs a CUDA device, and there is none here; leave it out to time the ranks on CPU\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)


def test_benchmark_table(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every form and backend once, its FLOPs over its time, and the ratio to a matmul timed beside it."""
    spans = iter([2.0, 4.0, 2.0, 1.0, 0.5])

    def milliseconds(function: object, repeats: int) -> float:
        function()  # type: ignore[operator]
        return next(spans)

    for name, value in {
        "gpu_milliseconds": milliseconds,
        "MATMUL_SIZE": 64,
        "GPU_FAMILIES": {"d0": [(2, 96, 48)]},
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    # The module's own tensors stay on CPU: only its question whether there is CUDA is answered otherwise.
    monkeypatch.setattr(
        benchmark,
        "device",
        type("Gpu", (), {"has_cuda": lambda: True, "device": lambda: None, "describe": lambda: "GPU"}),
    )
    benchmark.main(["--gpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        [form, dtype, backend]
        for backend in ("torch", "quack")
        for form, dtype in (("standard", "bf16"), ("gram", "fp16"))
    ]
    plain, standard = 2 * 64**3 / 2.0, 2 * NewtonSchulz().flops(96, 48, "standard") / 4.0
    assert f"{standard / plain:5.2f} of the matmul's" in lines[2]
    assert "8.00 x as fast as standard bf16 torch" in lines[5]
