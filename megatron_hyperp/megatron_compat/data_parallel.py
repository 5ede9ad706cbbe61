"""The base class by which Megatron-Core's schedules know a model that is wrapped for data parallelism."""

from megatron.core.distributed.data_parallel_base import _BaseDataParallel as DataParallelBase

__all__ = ["DataParallelBase"]
