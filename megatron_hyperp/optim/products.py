"""Symmetric products of batches of matrices, by PyTorch or by quack's kernels, and the Gram form's polynomial."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from megatron_hyperp import device
from megatron_hyperp.coefficients import Coefficients
from megatron_hyperp.errors import UsageError

# What computes symmetric products: PyTorch, or the optional kernels of Dao-AILab/quack (setup.py's extra "kernels").
BACKENDS = ("torch", "quack")
QUACK_PACKAGE = "quack-kernels>=0.6,<0.7"
# Its kernel computes the squares of this side on and above the diagonal, and needs rows of whole 16 bytes.
QUACK_TILE = 256
QUACK_MULTIPLE = 8


@functools.cache
def check_backend(backend: str, dtype: torch.dtype) -> None:
    """See that ``backend`` can compute symmetric products of ``dtype`` on this machine: nothing else ever stands in.

    Raises:
        ValueError: an unknown backend.
        UsageError: "quack" without a GPU of Hopper (SM90) or later, without its package, or neither in fp16 nor bf16.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; known are {', '.join(BACKENDS)}")
    if backend == "quack" and (lack := _quack_lack(dtype)):
        raise UsageError(f"backend 'quack' {lack}, or take backend 'torch'")


def _quack_lack(dtype: torch.dtype) -> str | None:
    """What quack lacks here to compute in ``dtype``, and how to get it; None if nothing."""
    capability = device.compute_capability()
    if capability is None:
        return "needs a CUDA device, and there is none here; run where there is one"
    if capability < (9, 0):
        found = ".".join(map(str, capability))
        return f"needs compute capability 9.0 (H100) or more, this GPU has {found}; run on a newer one"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in fp16 or bf16, dtype is {dtype}; give one of those"
    try:
        from quack.gemm_interface import gemm_symmetric  # type: ignore # noqa: F401
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        return f"needs the package quack-kernels ({reason}); pip install '{QUACK_PACKAGE}'"
    return None


def symmetric_product(
    left: torch.Tensor,
    right: torch.Tensor,
    add: torch.Tensor | None = None,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    backend: str = "torch",
) -> torch.Tensor:
    """Return left right, or alpha left right + beta add, [batch, n, n], which must be symmetric.

    Where the device gains from it, or the backend does it, blocks below the diagonal are mirrored, not computed.

    Args:
        left: [batch, n, k].
        right: [batch, k, n].
        add: [batch, n, n], or None for no sum.
        beta: factor of ``add``.
        alpha: factor of the product.
        backend: one of :data:`BACKENDS`.

    Raises:
        ValueError: an unknown backend, one that cannot run here, or sizes that it does not take.
    """
    if backend != "torch":
        check_backend(backend, left.dtype)
        return _quack_product(left, right, add, beta=beta, alpha=alpha)
    size = left.shape[1]
    blocks = device.symmetric_blocks(size)
    if blocks == 1:
        if add is None:
            return left @ right
        return torch.baddbmm(add, left, right, beta=beta, alpha=alpha)
    result = left.new_empty((len(left), size, size))
    height = -(-size // blocks)
    for low in range(0, size, height):
        high = min(low + height, size)
        rows, columns = left[:, low:high], right[:, :, low:]
        if add is None:
            result[:, low:high, low:] = torch.bmm(rows, columns)
        else:
            result[:, low:high, low:] = torch.baddbmm(add[:, low:high, low:], rows, columns, beta=beta, alpha=alpha)
        result[:, high:, low:high] = result[:, low:high, high:].mT
    return result


def _quack_product(
    left: torch.Tensor, right: torch.Tensor, add: torch.Tensor | None, *, beta: float, alpha: float
) -> torch.Tensor:
    """:func:`symmetric_product` by quack, on SM90 and later, in fp16 or bf16, accumulated in fp32.

    Written against ``quack.gemm_interface.gemm_symmetric(A, B, C=None, ..., alpha=1.0, beta=1.0)`` of quack-kernels
    0.6.0 to 0.6.5: A [batch, n, k], B [batch, k, n] and C [batch, n, n], each with rows or columns contiguous, give a
    new alpha A B + beta C. The first call for a dtype and layout compiles the kernel.
    """
    from quack.gemm_interface import gemm_symmetric

    if left.shape[1] % QUACK_MULTIPLE or left.shape[2] % QUACK_MULTIPLE:
        raise UsageError(
            f"backend 'quack' takes sizes that are multiples of {QUACK_MULTIPLE}, got the shape {tuple(left.shape)};"
            " take backend 'torch'"
        )
    if add is None:
        return gemm_symmetric(left, right)
    # It tells constants from tensors by isinstance(_, float): an integer would be taken for a tensor.
    return gemm_symmetric(left, right, C=add, alpha=float(alpha), beta=float(beta))


def gram_polynomial(gram: torch.Tensor, segment: Sequence[Coefficients], *, backend: str = "torch") -> torch.Tensor:
    """Return Q with Q X = the result of the steps in ``segment`` on X, from R = X X^T alone.

    Per step, Z = b R + c R^2; Q <- (Z + a) Q; R <- (Z + a) R (Z + a). All are polynomials in R and commute.

    Args:
        gram: R, [batch, n, n].
        segment: one (a, b, c) a step.
        backend: what computes the products, one of :data:`BACKENDS`.
    """
    multiply = functools.partial(symmetric_product, backend=backend)
    product: torch.Tensor | None = None
    for step, (a, b, c) in enumerate(segment):
        z = multiply(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        if product is None:
            product = z.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = multiply(product, z, product, beta=a)
        if step < len(segment) - 1:
            shifted = multiply(gram, z, gram, beta=a)
            gram = multiply(z, shifted, shifted, beta=a)
    assert product is not None
    return product
