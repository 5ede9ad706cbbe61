#!/usr/bin/env bash
# Newton-Schulz is scale-invariant on paper: c * G orthogonalizes like G. In the released packages it is not, in both
# directions and without a warning, because the Frobenius norm is taken in the input's precision and compared with a constant eps.
#
# Behaviour (torch 2.13.0, emerging-optimizers 0.3.0; 64 x 256 normal gradient times the factor shown):
#   * torch.optim.Muon: the update has the usual size down to a gradient norm near eps = 1e-7, then shrinks with the
#     gradient; a parameter whose gradients are small (an expert that receives few tokens) silently stops to train.
#   * emerging_optimizers newton_schulz: the same below eps = 1e-7, and above 1e18 the squares overflow, so that the
#     update of a finite gradient is exactly zero (so it is in torch.optim.Muon).
#   * its argument eps=1e-30, meant as a pure guard against zero, gives NaN from 1e-24 on: in fp32 the norm is already 0.
# Output seen on 2026-11-27 is at the end of this file. Needs Python >= 3.12 (PYTHON=...), about 6 GB, a few minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 emerging-optimizers==0.3.0
cat > "$folder/run.py" <<'PY'
import importlib.metadata as metadata
import math

import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

print("torch", metadata.version("torch"), "emerging-optimizers", metadata.version("emerging-optimizers"))
gradient = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


def of_torch(factor: float) -> float:
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    weight.grad = gradient * factor
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    return weight.detach().norm().item()


def of_emerging(factor: float, **options: float) -> float:
    return newton_schulz(gradient * factor, steps=5, coefficient_type="quintic", **options).norm().item()


columns = {"torch": of_torch, "emerging": of_emerging, "emerging, eps 1e-30": lambda f: of_emerging(f, eps=1e-30)}
usual = {name: column(1.0) for name, column in columns.items()}
found = {}
for factor in (1e19, 1.0, 1e-6, 1e-12, 1e-20, 1e-24):
    found[factor] = {name: column(factor) / usual[name] for name, column in columns.items()}
    print(f"gradient x {factor:<6g}", "  ".join(f"{name}: {ratio:.2g}" for name, ratio in found[factor].items()))
assert all(abs(ratio - 1) < 0.02 for ratio in found[1e-6].values())
assert found[1e-12]["torch"] < 0.05
assert found[1e-12]["emerging"] < 0.5
assert found[1e19]["emerging"] == found[1e19]["torch"] == 0.0
assert math.isnan(found[1e-24]["emerging, eps 1e-30"])
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/run.py"
# Output (sizes of updates, over that of the gradient x 1):
#   gradient x 1e+19  torch: 0        emerging: 0        emerging, eps 1e-30: 0
#   gradient x 1      torch: 1        emerging: 1        emerging, eps 1e-30: 1
#   gradient x 1e-06  torch: 1        emerging: 1        emerging, eps 1e-30: 1
#   gradient x 1e-12  torch: 0.0088   emerging: 0.079    emerging, eps 1e-30: 1
#   gradient x 1e-20  torch: 8.8e-11  emerging: 7.9e-10  emerging, eps 1e-30: 1
#   gradient x 1e-24  torch: 8.8e-15  emerging: 7.9e-14  emerging, eps 1e-30: nan
