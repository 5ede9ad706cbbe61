"""Routing kernels that Megatron-Core imports; this trainer's router has its own gates."""

fused_compute_score_for_moe_aux_loss = None
fused_moe_aux_loss = None
fused_topk_with_score_function = None
