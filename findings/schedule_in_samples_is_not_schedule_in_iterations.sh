#!/usr/bin/env bash
# Megatron counts a schedule in iterations (--train-iters) or in samples (--train-samples), where each step adds the global
# batch. With a constant batch the two look like the same schedule.
#
# Behaviour (megatron-core 0.16.1): they are not the same bits. The warm-up multiplies before it divides, so that the learning
# rate differs in its last bit at some steps unless the batch is a power of two; linear and cosine decay, which divide first,
# agree. A run that is moved from one count to the other, or compared with a run by the other, is not bit for bit the same.
# Output seen on 2026-11-27 is at the end of this file. Needs Python 3.11; about 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy megatron-core==0.16.1
cat > "$folder/run.py" <<'PY'
import importlib.metadata as metadata

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

print("megatron-core", metadata.version("megatron-core"))
WARMUP, STEPS = 7, 40


def rates(unit):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.param_groups[0] |= {"lr_mult": 1.0, "wd_mult": 1.0}
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=3e-4,
        min_lr=3e-5,
        lr_warmup_steps=WARMUP * unit,
        lr_decay_steps=STEPS * unit,
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=STEPS * unit,
        wd_incr_style="constant",
    )
    found = []
    for _ in range(STEPS):
        scheduler.step(unit)
        found.append(optimizer.param_groups[0]["lr"])
    return found


iterations = rates(1)
differs = {}
for batch in (8, 64, 6, 48, 96, 1000):
    differs[batch] = [step + 1 for step, pair in enumerate(zip(rates(batch), iterations)) if pair[0] != pair[1]]
    print(f"global batch {batch:4}: the rate differs from that of iterations after steps {differs[batch]}")
assert not differs[8] and not differs[64]
assert all(differs[batch] and max(differs[batch]) < WARMUP for batch in (6, 48, 96, 1000))
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/run.py" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
# Output:
#   global batch    8: the rate differs from that of iterations after steps []
#   global batch   64: the rate differs from that of iterations after steps []
#   global batch    6: the rate differs from that of iterations after steps [3, 5, 6]
#   global batch   48: the rate differs from that of iterations after steps [3, 5, 6]
#   global batch   96: the rate differs from that of iterations after steps [3, 5, 6]
#   global batch 1000: the rate differs from that of iterations after steps [3, 6]
