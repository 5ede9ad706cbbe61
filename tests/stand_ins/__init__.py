"""Stand-ins for libraries that need CUDA, so that what we build on them can be tested without.

Megatron-Core looks for these libraries as it is imported: call before that, in a process of its own. Ranks that are
forked from one of the modules ``preload_*`` have them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

APEX = "fused_weight_gradient_mlp_cuda"


def stand_in_for_transformer_engine() -> None:
    """Let this process find the stand-in under TransformerEngine's name, and take it for usable."""
    if "transformer_engine" in sys.modules:
        return
    assert "megatron.core" not in sys.modules, "Megatron-Core has already looked for TransformerEngine"
    sys.path.insert(0, str(Path(__file__).parent))
    from megatron_hyperp import libraries

    lacks = libraries.lacks
    libraries.lacks = lambda extension: None if extension == libraries.TRANSFORMER_ENGINE else lacks(extension)
    libraries.lacks_fp8 = lambda recipe: None


def stand_in_for_apex() -> Any:
    """Let this process find a module like apex's, which adds a weight's gradient to its fp32 sums, and counts calls.

    Returns:
        The module; its ``calls`` are the number of products since they were last set to 0.
    """
    if APEX not in sys.modules:
        assert "megatron.core" not in sys.modules, "Megatron-Core has already looked for apex"
        module: Any = ModuleType(APEX)

        def accumulate(x: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
            module.calls += 1
            main_grad += gradient.float().t() @ x.float()

        module.calls, module.wgrad_gemm_accum_fp32 = 0, accumulate
        sys.modules[APEX] = module
    return sys.modules[APEX]
