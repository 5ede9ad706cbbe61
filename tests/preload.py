"""What forked ranks have imported: the trainer, adapted to the CPU."""

from megatron_hyperp import device

device.adapt_megatron()


import megatron_hyperp.model.build  # noqa: E402
import megatron_hyperp.optim.distributed  # noqa: E402
import megatron_hyperp.training.pretrain  # noqa: F401,E402
