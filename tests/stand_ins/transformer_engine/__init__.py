"""A stand-in for TransformerEngine 2.11: its layers' interface and arithmetic in plain PyTorch.

As far as Megatron-Core's wrappers reach: parameters have TransformerEngine's names and marks, tensor parallelism
communicates as it does, and under ``fp8_autocast`` weights are rounded once a step and kept for its micro-batches.
"""

from . import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
