"""Sweeps, and the laws fitted to what they measure."""
