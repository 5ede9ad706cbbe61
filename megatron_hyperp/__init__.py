"""HyperP for Megatron-Core: hypersphere-constrained Muon whose learning rate transfers."""

import warnings

__version__ = "0.1.0"

# Megatron-Core announces each optional package it does without, from a dozen modules, while it is imported; a run says
# it once instead (megatron_hyperp.device.describe).
warnings.filterwarnings("ignore", message=r".*([Aa]pex|Transformer Engine|transformer_engine).*", category=UserWarning)
