"""Tests of this folder start no process."""

from tests.no_processes import commands_leave_by_exceptions, no_processes

__all__ = ["commands_leave_by_exceptions", "no_processes"]
