#!/usr/bin/env bash
# Megatron-Core builds a layer from a ModuleSpec, and passes the model's own process groups (pg_collection) to its parts. The
# usual way to change a part is to put a subclass into the spec.
#
# Behaviour (megatron-core 0.16.1): a subclass of MoELayer gets no process groups. TransformerLayer decides by comparing the
# spec's class with MoELayer itself, not with issubclass, and the subclass then takes the global groups of parallel_state. In a
# job with several models, or with other groups than the global ones, its tokens are exchanged with other ranks than the
# model's; with the global groups nothing differs. The only sign is a warning in the log.
# Output seen on 2026-11-28 is at the end of this file. Needs Python 3.11; about 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy psutil megatron-core==0.16.1
cat > "$folder/run.py" <<'PY'
import importlib.metadata as metadata

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

print("megatron-core", metadata.version("megatron-core"))
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
config = TransformerConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    num_moe_experts=2,
    moe_ffn_hidden_size=16,
    add_bias_linear=False,
    use_cpu_initialization=True,
)


class Subclass(MoELayer):
    pass


def gets_groups(kind):
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.ep = dist.new_group([0])
    spec = get_gpt_layer_local_spec(num_experts=2, moe_grouped_gemm=False)
    spec.submodules.mlp.module = kind
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    assert type(layer.mlp) is kind
    print(f"{kind.__name__}: expert-parallel group of the model: {layer.mlp.ep_group is groups.ep}")
    return layer.mlp.ep_group is groups.ep


assert gets_groups(MoELayer)
assert not gets_groups(Subclass)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/run.py" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
# Output:
#   megatron-core 0.16.1
#   MoELayer: expert-parallel group of the model: True
#   Subclass: expert-parallel group of the model: False
