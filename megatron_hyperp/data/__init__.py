"""From text to batches: tokenizers, preprocessing to Megatron's indexed format, and the data loader."""
