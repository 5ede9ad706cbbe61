"""Layers."""

from . import distributed, ops
from .attention import DotProductAttention
from .fp8 import fp8_autocast
from .layers import Fp8Padding, Fp8Unpadding, GroupedLinear, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8_autocast",
    "ops",
]
