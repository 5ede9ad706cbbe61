"""``--deterministic-mode``: kernels and collectives of which two runs give the same bits (docs/determinism.md)."""

from __future__ import annotations

import os

import torch

from megatron_hyperp.errors import UsageError

# What CUDA's libraries read when they start, the values with which they are deterministic, and the one that is set
# where none is: cuBLAS (CUDA's documentation, "Results Reproducibility"), NCCL's all-reduces without NVLink's switches
# (Megatron-LM's list), TransformerEngine's attention (Megatron-Core insists).
SETTINGS = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def begin() -> None:
    """Let this process compute deterministically from now on; call before CUDA and process groups are used.

    From here on torch refuses an operation that has no deterministic kernel on the device that it runs on.

    Raises:
        UsageError: the environment asks for what is not deterministic.
    """
    for name, allowed in SETTINGS.items():
        given = os.environ.setdefault(name, allowed[0])
        if given not in allowed:
            raise UsageError(
                f"{name} is {given}, of which --deterministic-mode cannot be; unset it, or give {' or '.join(allowed)}"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
