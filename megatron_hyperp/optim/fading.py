"""Matrices whose gradient is exactly zero: an expert without tokens, a masked layer.

Orthogonalization and the sphere undo the decay of a momentum, so that such a matrix would move on at full step, in the
direction of its last momentum, without end: in fp32 elements of ten denormal units no longer shrink when multiplied by
0.95. Here its step fades as its momentum does, by mu^k after k steps without a gradient: half after 13 steps at
mu = 0.95, and 1 / (1 - mu) = 20 steps' worth in all. A step with a gradient is a full one again, so that a gap of a
step or two changes little.

The number k is state, one count per row (``[rows, 1]``, all rows of a matrix alike), so that it is sharded,
checkpointed and resharded as other row-wise state is. It is exact where a ratio of stored norms is not: that of a
momentum rounded to two bytes is off by the rounding of each step, and that of a denormal one stops falling.

Nothing here communicates. Where a matrix is sharded, :func:`received` is summed over its parts before
:func:`count_idle_`; all parts then have the same counts.
"""

from __future__ import annotations

import functools

import torch

from megatron_hyperp.optim.magnitudes import largest_elements

ZERO_GRADIENTS = ("fade", "walk")
# Name of the state entry.
IDLE_STEPS = "idle_steps"
# At this share of a step a matrix is at rest: such a step is below the rounding of fp32 weights.
REST = 2.0**-24
# Or after so many steps without a gradient, whatever the decay; counts up to 2^24 are exact in fp32.
MOST_STEPS = 2**20


def check_zero_gradients(value: object) -> None:
    """See that ``value`` is one of :data:`ZERO_GRADIENTS`.

    Raises:
        ValueError: it is not.
    """
    if value not in ZERO_GRADIENTS:
        raise ValueError(f"zero_gradients is {value!r}; it must be {' or '.join(map(repr, ZERO_GRADIENTS))}")


def received(gradients: torch.Tensor) -> torch.Tensor:
    """Return [count] float64: 1 for each matrix, or local part, with an element other than zero (NaN too), 0 else.

    Args:
        gradients: [count, rows, columns], none of them zero in number.
    """
    return (largest_elements(gradients)[:, 0, 0] != 0).double()


def count_idle_(idle: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Count a step, in place; return the steps since the last gradient, [count].

    Args:
        idle: state, [count, rows, 1] fp32.
        received: [count], :func:`received` summed over the parts of each matrix: 0 where its gradient is zero.
    """
    idle.add_(1.0).mul_((received == 0).to(idle.dtype)[:, None, None])
    return idle[:, 0, 0]


def shares(steps: torch.Tensor, decay: float) -> torch.Tensor:
    """Return [count] float64: the share of a step that a matrix takes, decay^steps, exactly 0 at rest.

    Args:
        steps: [count], steps since the last gradient.
        decay: of the momentum in one step: Muon's mu, Adam's beta1.
    """
    table = _table(decay, steps.device)
    return table[steps.long().clamp_max(len(table) - 1)]


def decays(idle: torch.Tensor, decay: float) -> torch.Tensor:
    """Return [count, 1, 1] fp32: the decay of each momentum in this step, 0 for those at rest since the step before.

    So a momentum is exactly zero before it would be denormal. A product with this takes no longer than one with a
    number.

    Args:
        idle: state, [count, rows, 1], before this step is counted.
        decay: as in :func:`shares`.
    """
    awake = shares(idle[:, 0, 0], decay) > 0
    return (awake.to(torch.float32) * decay)[:, None, None]


@functools.cache
def _table(decay: float, device: torch.device) -> torch.Tensor:
    """Return the shares after 0, 1, 2, ... steps, float64; the last is 0.

    A table, because torch.pow on CPU may differ in the last bit between places of a tensor, and so between layouts.
    """
    powers = [1.0]
    while len(powers) < MOST_STEPS and powers[-1] * decay >= REST:
        powers.append(powers[-1] * decay)
    return torch.tensor([*powers, 0.0], dtype=torch.float64, device=device)
