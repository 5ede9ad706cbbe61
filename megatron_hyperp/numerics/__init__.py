"""Arithmetic that the model and the optimizer share."""
