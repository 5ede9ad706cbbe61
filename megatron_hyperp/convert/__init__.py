"""Checkpoints in and out: ours, Hugging Face's, Megatron-LM's and ArchScale's, tensor by tensor."""
