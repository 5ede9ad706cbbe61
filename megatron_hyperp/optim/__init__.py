"""Optimizers. One rank: :class:`MuonH` and :class:`AdamH`. A Megatron-Core job: :func:`hyperp_optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_hyperp.optim.adamh import AdamH
from megatron_hyperp.optim.muonh import MuonH
from megatron_hyperp.optim.options import HyperPConfig
from megatron_hyperp.optim.orthogonalize import newton_schulz
from megatron_hyperp.optim.rules import Part, StateEntry, UpdateRule, register

if TYPE_CHECKING:
    from megatron_hyperp.optim.api import hyperp_optimizer

__all__ = [
    "AdamH",
    "HyperPConfig",
    "MuonH",
    "Part",
    "StateEntry",
    "UpdateRule",
    "hyperp_optimizer",
    "newton_schulz",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import Megatron-Core only where it is needed: the one-rank optimizers do without it."""
    if name == "hyperp_optimizer":
        from megatron_hyperp.optim.api import hyperp_optimizer

        return hyperp_optimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
