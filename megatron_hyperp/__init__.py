"""HyperP for Megatron-Core: hypersphere-constrained Muon whose learning rate transfers."""

import logging
import warnings

__version__ = "0.1.0"

# Megatron-Core announces each optional package it does without, from a dozen modules, while it is imported; a run says
# it once instead (megatron_hyperp.device.describe).
warnings.filterwarnings("ignore", message=r".*([Aa]pex|Transformer Engine|transformer_engine).*", category=UserWarning)
# Megatron-Core 0.17 and later import this module, which warns wherever there is a CUDA compiler and no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
