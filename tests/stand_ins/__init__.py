"""Stand-ins for libraries that need CUDA, so that what we build on them can be tested without.

Megatron-Core looks for these libraries as it is imported: call before that, in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path


def stand_in_for_transformer_engine() -> None:
    """Let this process find the stand-in under TransformerEngine's name, and take it for usable."""
    assert "megatron.core" not in sys.modules, "Megatron-Core has already looked for TransformerEngine"
    sys.path.insert(0, str(Path(__file__).parent))
    from megatron_hyperp import libraries

    lacks = libraries.lacks
    libraries.lacks = lambda extension: None if extension == libraries.TRANSFORMER_ENGINE else lacks(extension)
    libraries.lacks_fp8 = lambda recipe: None
