"""Norms of matrices of any finite size: they are scaled by powers of two first, which changes no bit of the result.

Squares of fp32 numbers below 1e-19 are denormal or zero, and those above 1.8e19 are infinite. A factor 2^k multiplies
every element exactly, and every square by 2^2k, so that a matrix whose squares are in range has the same bits of
x / ||x|| with and without it.
"""

from __future__ import annotations

import math

import torch


def largest_elements(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of each matrix of [count, rows, columns], as [count, 1, 1]."""
    # Two reductions are three times as fast on CPU as the infinity norm, and need no copy as abs() does.
    return torch.maximum(x.amax(dim=(1, 2), keepdim=True), x.amin(dim=(1, 2), keepdim=True).neg())


def power_of_two(largest: torch.Tensor) -> torch.Tensor:
    """Return the power of two that scales ``largest`` into [0.5, 1), as far as normal numbers reach.

    The smallest denormal becomes 2^-24 in fp32 (2^-53 in fp64), and the largest number stays below 4: squares of both
    are in range. The factor of 0 is finite.

    Args:
        largest: fp32 or fp64, not negative; of any shape.
    """
    limits = torch.finfo(largest.dtype)
    # The factors of these bounds, and so all, are normal: hardware that flushes denormals to zero has the same ones.
    bounded = largest.clamp(limits.tiny, 0.5 / limits.tiny)
    # A quotient that is a power of two is exact; torch.ldexp and torch.exp2 promise no such thing.
    return torch.frexp(bounded).mantissa / bounded


def rescale_(x: torch.Tensor) -> torch.Tensor:
    """Scale each matrix of [count, rows, columns] by its power of two, in place; return the factors, [count]."""
    factors = power_of_two(largest_elements(x))
    x.mul_(factors)
    return factors[:, 0, 0]


def squared_norms(x: torch.Tensor) -> torch.Tensor:
    """Return [count] float64: ||X||^2 of each fp32 matrix of [count, rows, columns]; not finite only if X is not."""
    factors = power_of_two(largest_elements(x))
    scaled = x * factors
    return scaled.square_().sum(dim=(1, 2), dtype=torch.float64) / factors[:, 0, 0].double().square()


def factors_in_range(factor: float) -> list[float]:
    """Return factors, normal in fp32, whose product is ``factor`` > 0: the factor itself, or its root twice."""
    return [factor] if factor > torch.finfo(torch.float32).tiny else [math.sqrt(factor)] * 2
