"""What ranks of the fault suite import, once: they are forked from a process that holds it."""

from megatron_hyperp import device

device.adapt_megatron()


import megatron_hyperp.model.build  # noqa: E402
import megatron_hyperp.optim.distributed  # noqa: E402
import megatron_hyperp.training.pretrain  # noqa: F401,E402
