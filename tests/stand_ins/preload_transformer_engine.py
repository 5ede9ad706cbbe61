"""What ranks with the stand-in for TransformerEngine have imported."""

from tests.stand_ins import stand_in_for_transformer_engine

stand_in_for_transformer_engine()


import tests.preload  # noqa: F401,E402
