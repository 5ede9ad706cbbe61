#!/usr/bin/env bash
# Pretrain on the GPUs of this node; started again, it goes on from the last checkpoint.
#
#   bash examples/torchrun/single_node.sh dense_d8 --data-path data/corpus --tokenizer-model data/tokenizer.model
#
# Settings: common.sh has them, with their defaults.
set -euo pipefail
# shellcheck source=examples/torchrun/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

choose_layout "$NPROC_PER_NODE"
# A rendezvous of its own, at a port that is free.
pretrain --standalone
