"""Operations that Megatron-Core names in its annotations."""


class Sequential:
    """Fused operations, which this trainer does not use."""


class FusibleOperation:
    """One of them."""
