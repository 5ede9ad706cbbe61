"""From text to batches: tokenizers, preprocessing to Megatron's indexed format, datasets and batches."""
