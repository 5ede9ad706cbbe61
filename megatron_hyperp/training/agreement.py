"""Before they train, all ranks agree: on the code, the settings, the layers, and the checkpoint to go on from."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from megatron_hyperp import libraries
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.checkpointing import own_checkpoints

# What else ranks must have alike; how to mend it if they do not.
_CHECKPOINT, _LAYERS, _CODE = "checkpoint", "layers", "code of megatron_hyperp"
REMEDIES = {
    _CHECKPOINT: "--load and --save must name a folder that all nodes share",
    _LAYERS: "install the same on all nodes, or give --transformer-impl local and --no-gradient-accumulation-fusion",
    _CODE: "start all nodes from one checkout",
}
PACKAGES = ("torch", "megatron-core", "numpy")


def agree(config: Config, resume_from: Path | None) -> None:
    """See that every rank runs the same code with the same settings, from the same checkpoint; a collective call.

    Ranks that found no checkpoint would wait for those that did; layers that each node chooses by what is installed
    there differ in the order of their gradients, which would meet others' in one reduction; another learning rate or
    seed on one node would train something that nobody asked for.

    Args:
        config: resolved.
        resume_from: the checkpoint that this rank found.

    Raises:
        UsageError: ranks differ; the first difference is told.
    """
    mine = told(config, resume_from)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
    if other is None:
        return
    both = [mine, mine]
    for index, rank in enumerate((0, other)):
        sent = [mine]
        dist.broadcast_object_list(sent, rank)
        both[index] = sent[0]
    name = next(name for name in both[0] if both[0][name] != both[1].get(name))
    remedy = REMEDIES.get(name, "give all ranks the same flags, config files and packages")
    raise UsageError(
        f"rank 0 has {name} {both[0][name]}, and rank {other} {both[1].get(name)}; {remedy}", same_on_all_ranks=True
    )


def told(config: Config, resume_from: Path | None) -> dict[str, str]:
    """Return all that ranks must have alike, by its name."""
    pretrained = config.checkpoint.pretrained_checkpoint is not None and not own_checkpoints(config)
    source = " of --pretrained-checkpoint" if pretrained else ""
    found = {
        _CHECKPOINT: resume_from.name + source if resume_from else "none",
        _LAYERS: libraries.describe(config).removeprefix("layers: "),
    }
    for section in config.to_dict().values():
        found |= {name: str(value) for name, value in section.items()}
    found |= {package: version(package) for package in PACKAGES} | {"Python": platform.python_version()}
    return found | {_CODE: code_digest()}


def code_digest() -> str:
    """Return a hash of this package's sources: 12 hexadecimal digits."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
