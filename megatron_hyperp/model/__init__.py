"""The model: Megatron-Core's GPTModel with Depth-muP residuals, the paper's attention scale and initialisation."""
