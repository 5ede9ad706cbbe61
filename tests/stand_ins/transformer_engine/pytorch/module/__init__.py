"""Base of the layers."""
