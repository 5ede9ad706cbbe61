#!/usr/bin/env bash
# An asynchronous save copies tensors from the GPU before the call returns, so that training can go on and change them. Tensors
# that are in host memory already, such as those of an optimizer that is offloaded to the CPU, should be copied as well.
#
# Behaviour (megatron-core 0.19.2): with the persistent writer (AsyncCallsQueue(persistent=True); Megatron-LM's
# --use-persistent-ckpt-worker) a tensor in host memory is written with the values that it has when the writer comes to it. It is
# handed to the writer through shared memory, and "moved to the CPU" there, which copies nothing; in-place updates after the call
# has returned end up in the checkpoint, without an error. With the writer that is forked for each save, which the same queue has
# by default, it is the values of the call. No GPU is needed here: three names of torch.cuda are replaced by what they return
# where there is one, since the writer binds itself to a device first (without any it ends in a ZeroDivisionError, for which the
# save waits forever; hence the timeout below).
# Output seen on 2026-11-30 is at the end of this file. Needs Python 3.12; about 5 GB of disk, five minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy psutil megatron-core==0.19.2
cat > "$folder/run.py" <<'PY'
import importlib.metadata as metadata
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import async_utils

COUNT = 1 << 22


def as_with_a_gpu():
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda _: None
    torch.cuda.synchronize = lambda: None
    torch.cuda.current_device = lambda: torch.device("cpu")


def writer(loop, *words):
    as_with_a_gpu()
    loop(*words)


class Spawn:
    """Starts the persistent writer as Megatron-Core does, in a new interpreter."""

    def __init__(self):
        self.context = torch.multiprocessing.get_context("spawn")
        self.JoinableQueue, self.Queue = self.context.JoinableQueue, self.context.Queue

    def get_context(self, _):
        return self

    def Process(self, target, args):
        return self.context.Process(target=writer, args=(target, *args))


def main(persistent):
    as_with_a_gpu()
    forks = async_utils.mp
    if persistent:
        async_utils.mp = Spawn()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weight = torch.full((COUNT,), 1.0)
    queue = async_utils.AsyncCallsQueue(persistent=persistent)
    with tempfile.TemporaryDirectory() as folder:
        state = {"weight": ShardedTensor.from_rank_offsets("weight", weight, replica_id=0)}
        request = dist_checkpointing.save(state, folder, async_sharded_save=True, async_strategy="mcore")
        queue.schedule_async_request(request)
        weight.fill_(7.0)
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
        loaded = {"weight": torch.zeros(COUNT)}
        torch_checkpoint.load(loaded, storage_reader=torch_checkpoint.FileSystemReader(folder))
    async_utils.mp = forks
    values = loaded["weight"].unique().tolist()
    kind = "persistent" if persistent else "forked"
    print(f"{kind} writer: 1.0 when the save was called, 7.0 when it had returned; the checkpoint has {values}", flush=True)
    assert values == [7.0] if persistent else values == [1.0]


if __name__ == "__main__":
    if sys.argv[1] == "persistent":
        print("megatron-core", metadata.version("megatron-core"), flush=True)
    main(sys.argv[1] == "persistent")
PY
for writer in persistent forked; do
  OMP_NUM_THREADS=1 timeout --kill-after=5 300 "$folder/venv/bin/python" -W ignore "$folder/run.py" $writer 2> "$folder/errors" \
    || { cat "$folder/errors"; exit 1; }
done
# Output:
#   megatron-core 0.19.2
#   persistent writer: 1.0 when the save was called, 7.0 when it had returned; the checkpoint has [7.0]
#   forked writer: 1.0 when the save was called, 7.0 when it had returned; the checkpoint has [1.0]
