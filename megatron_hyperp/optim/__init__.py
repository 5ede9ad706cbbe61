"""Optimizers. One rank: :class:`MuonH` and :class:`AdamH`. A Megatron-Core job: ``optim.distributed``."""

from megatron_hyperp.optim.adamh import AdamH
from megatron_hyperp.optim.muonh import MuonH
from megatron_hyperp.optim.orthogonalize import newton_schulz

__all__ = ["AdamH", "MuonH", "newton_schulz"]
