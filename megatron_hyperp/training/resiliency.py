"""Signs of life for ``ft_launcher``, the launcher of nvidia-resiliency-ext, which restarts ranks that hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_hyperp.errors import UsageError

# Set by ft_launcher for each rank.
SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


@contextmanager
def launcher_reports() -> Iterator[Callable[[], None]]:
    """Yield what tells the launcher that an iteration is done; under any other launcher it does nothing.

    Raises:
        UsageError: ft_launcher started this rank, and the package is not installed here.
    """
    if SOCKET not in os.environ:
        yield _nothing
        return
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
    except ImportError as error:
        raise UsageError(
            f"{SOCKET} is set, but nvidia-resiliency-ext cannot be imported ({error}); install it for this Python, or"
            " start the ranks with torchrun"
        ) from error
    client = RankMonitorClient()
    client.init_workload_monitoring()
    try:
        yield client.send_heartbeat
    finally:
        client.shutdown_workload_monitoring()


def _nothing() -> None: ...
