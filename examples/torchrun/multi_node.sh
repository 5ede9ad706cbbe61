#!/usr/bin/env bash
# Pretrain on several nodes: start this on each of them, in any order, with the same words and settings.
#
#   NNODES=4 HEAD=node1 bash examples/torchrun/multi_node.sh dense_d16 --data-path data/corpus \
#     --tokenizer-model data/tokenizer.model
#
# NNODES nodes meet at HEAD, the name or address of one of them. If a rank fails, or a node is cut off for a while, the
# ranks of all nodes start again from the last checkpoint, MAX_RESTARTS times. A node that was down comes back by the same
# command. Further settings: common.sh has them.
set -euo pipefail
# shellcheck source=examples/torchrun/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# How many nodes take part. The job waits until all are there.
[ -n "${NNODES-}" ] || refuse "NNODES is not set; set it to the number of nodes"

# The node where the others meet; it must live as long as the job.
[ -n "${HEAD-}" ] || refuse "HEAD is not set; set it to the name or address of one of the nodes"

# A free port there, and a name of the job that no other one there has: the user's and the run's, on all nodes the same.
PORT=${PORT:-29500}
JOB_ID=${JOB_ID:-$(id -un)-${RUN_DIR//\//-}}

# Seconds that nodes wait for each other when they meet, at the start and after a failure.
JOIN_TIMEOUT=${JOIN_TIMEOUT:-900}

meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$JOB_ID")
conf=join_timeout=$JOIN_TIMEOUT
# Whether this node is HEAD (1 or 0), where its name does not tell.
[ -z "${IS_HEAD-}" ] || conf+=,is_host=$IS_HEAD
# The address at which the other nodes reach this one, where its host name is not enough.
[ -z "${NODE_ADDR-}" ] || meeting+=(--local-addr "$NODE_ADDR")

choose_layout $((NNODES * NPROC_PER_NODE))
# A port that another program or job has is refused: torchrun would wait there forever, or meet in the other job's store.
[ "${DRY_RUN:-0}" = 1 ] ||
  "$PYTHON" -m megatron_hyperp.rendezvous ${IS_HEAD:+--is-head "$IS_HEAD"} --wait "$JOIN_TIMEOUT" -- \
    "$HEAD" "$PORT" "$JOB_ID" || exit
pretrain "${meeting[@]}" --rdzv-conf "$conf"
