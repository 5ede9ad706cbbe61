"""The installed version of Megatron-Core."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

megatron_core_version = Version(metadata.version("megatron-core"))
