"""Which recipe holds now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from transformer_engine.common.recipe import Recipe


class FP8GlobalStateManager:
    """What Megatron-Core asks for."""

    recipe: Recipe | None = None
    # Every recipe that was entered, for tests to look at.
    entered: ClassVar[list[Recipe]] = []

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether layers round now."""
        return cls.recipe is not None


@contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    """Let layers round inside."""
    del fp8_group
    manager, before = FP8GlobalStateManager, FP8GlobalStateManager.recipe
    manager.recipe = fp8_recipe if enabled else None
    if enabled:
        manager.entered.append(fp8_recipe)
    try:
        yield
    finally:
        manager.recipe = before


@contextmanager
def fp8_model_init(**_: Any) -> Iterator[None]:
    """Weights that are built inside are kept in FP8: Megatron-Core imports it, and this trainer builds none."""
    raise NotImplementedError
    yield
