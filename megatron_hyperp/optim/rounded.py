"""A momentum in two bytes an element: fp16, with one power of two for each matrix that scales its largest element.

fp16 keeps 11 bits where bf16 keeps 8, so that rounding errors are an eighth as large, and its narrow range, which would
lose a small momentum, no longer matters: elements down to 2^-26 of the largest of their matrix are rounded to 11 bits,
and those below it with an error of at most 2^-37 of the largest.

Where ranks hold parts of a matrix each part has a unit of its own, without communication. Powers of two do not change
what rounding makes of an element as long as it is a normal number in fp16. So a part differs from the same part of a
whole matrix only in elements below 2^-26 of the matrix's largest, by at most 2^-36 of that.

In checkpoints such a momentum is fp32, as :func:`restored` returns it, which any layout and any momentum dtype can
load. Rounding that again gives the same bits and units (:func:`round_to_half`).
"""

from __future__ import annotations

import torch

from megatron_hyperp.optim.magnitudes import largest_elements, power_of_two

# The largest element of a matrix is brought below this: four times it, which power_of_two allows for, is in range.
LARGEST = 2.0**13
# Factors and units are normal numbers in fp32. At the bound even denormal numbers become normal ones in fp16.
LARGEST_FACTOR = 2.0**126


def round_to_half(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x`` as values [count, rows, columns] fp16 and units [count] fp32, of which x is nearly the product.

    Args:
        x: [count, rows, columns] fp32. A matrix of zeros stays zero; one that is not finite does not become finite.
    """
    values = torch.empty_like(x, dtype=torch.float16)
    units = x.new_empty(len(x))
    store_(values, units, x)
    return values, units


def store_(values: torch.Tensor, units: torch.Tensor, x: torch.Tensor) -> None:
    """Round as :func:`round_to_half`, into ``values`` and ``units``."""
    factors = _factors(largest_elements(x))
    torch.mul(x, factors, out=values)
    units.copy_(factors[:, 0, 0].reciprocal())


def restored(values: torch.Tensor, units: torch.Tensor, *, decay: float | torch.Tensor | None = None) -> torch.Tensor:
    """Return what was rounded, [count, rows, columns] fp32, times ``decay``.

    Args:
        values: [count, rows, columns] fp16.
        units: [count] fp32.
        decay: a number, or [count, 1, 1]; it takes no pass over the elements of its own.
    """
    units = units[:, None, None]
    return values.to(units.dtype).mul_(units if decay is None else units * decay)


def _factors(largest: torch.Tensor) -> torch.Tensor:
    """Return the powers of two that scale ``largest``, rounded to fp16's 11 bits, into [0.5, 1) x :data:`LARGEST`.

    The largest element is rounded first, so that factors are the same before and after all elements are rounded.
    """
    factors = power_of_two(largest)
    rounded = (largest * factors).to(torch.float16).to(largest.dtype)
    # The bounds keep denormal numbers, and a matrix of zeros, from factors that are no numbers.
    return (factors * power_of_two(rounded)).clamp_max(LARGEST_FACTOR / LARGEST) * LARGEST
