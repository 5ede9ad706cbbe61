"""One forward step, as Megatron-Core's schedules call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_hyperp import device

Batches = Iterator[dict[str, torch.Tensor]]


def forward_step(
    batches: Batches, model: torch.nn.Module, *, draw: Callable[[Batches], dict[str, torch.Tensor]] = next
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Megatron-Core's forward step: draw a micro-batch, run this chunk, say how its output becomes a loss."""
    batch = {name: value.to(device.device(), non_blocking=True) for name, value in draw(batches).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_function, batch["loss_mask"])


def loss_function(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses that count.

    Args:
        loss_mask: [batch, sequence], 1 where a token counts.
        losses: [batch, sequence].

    Returns:
        The sum, the number of tokens (both as Megatron-Core's per-token loss wants them), and a detached report.
    """
    mask = loss_mask.float()
    total, tokens = (losses.float() * mask).sum(), mask.sum()
    # A clone: Megatron-Core's schedules scale the loss in place.
    report = torch.stack([total.detach().clone(), tokens]).double()
    return total, tokens.int(), {"loss": report}
