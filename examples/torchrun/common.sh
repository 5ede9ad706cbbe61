# shellcheck shell=bash
# Sourced by the launch scripts of examples/: what a node trains, and with which environment. Run from the repository:
#
#   SCRIPT RECIPE [flags of pretrain_gpt.py]
#
# RECIPE is a file of examples/configs without .yaml (dense_d8 to dense_d24, moe_d8 to moe_d24), or a path. Flags beat it.
# Settings are environment variables; an unset one has the default that stands here.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$repository" || exit 2

refuse() {
  echo "error: $*" >&2
  exit 2
}

# whole NAME: refuse a setting that is no number. Bash runs what stands in $(...) where it reckons with a variable.
whole() {
  [[ ${!1} =~ ^[0-9]{1,9}$ ]] || refuse "$1 is '${!1}'; set it to a whole number"
}

# show WORDS: print a command as one would type it.
show() { printf '%q ' "$@" && echo; }

# --- What runs ---------------------------------------------------------------------------------------------------------

# Python, with torchrun's module beside it: that of the set-up if there is one, else the first (a container's, say).
if [ -z "${PYTHON-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=$repository/.venv/bin/python; else PYTHON=python3; fi
fi

# Processes on this node, one per GPU.
if [ -z "${NPROC_PER_NODE-}" ]; then
  NPROC_PER_NODE=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  [ "$NPROC_PER_NODE" -gt 0 ] || refuse "nvidia-smi finds no GPU here; set NPROC_PER_NODE to the number of processes"
fi
whole NPROC_PER_NODE
[ -z "${NNODES-}" ] || whole NNODES

# How often torchrun starts all ranks again, from the last checkpoint, after one has failed.
MAX_RESTARTS=${MAX_RESTARTS:-3}

# Seconds from a signal, or from the loss of a rank, until torchrun kills what still runs: time for a step and a save.
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-100}

# --- The environment of the ranks --------------------------------------------------------------------------------------

# Threads of CPU operators in each rank. More would fight with the other ranks for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# One hardware queue: GPUs before Blackwell then start communication in the order of the program, ahead of the product
# that it overlaps with. Megatron-Core requires it for tensor and sequence parallelism there.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# Grow memory segments in place of adding new ones: less is lost to gaps between tensors of varying size.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# What NCCL warns of, and nothing else. INFO shows the rings, trees and network devices that it found.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Remember the last collectives of each rank, and write them to files when one times out: which rank was missing?
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# A store of addresses for each start of the ranks. Torchrun's own outlives them, and ranks that were started again would
# look for each other where the dead ones were (PyTorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Left to you, since they name parts of your network (docs/multi-node.md):
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the interface for TCP, where the first one found is the wrong one
#   NCCL_IB_HCA                              the InfiniBand or RoCE adapters to use

# --- From the command line to what torchrun starts ---------------------------------------------------------------------

[ $# -gt 0 ] || refuse "no recipe; give one of: $(cd examples/configs && printf '%s ' ./*.yaml | sed 's#\./##g; s#\.yaml##g')"
recipe=$1
shift
[ -f "$recipe" ] || recipe=examples/configs/$recipe.yaml
[ -f "$recipe" ] || refuse "there is no recipe $recipe; give a file of examples/configs without .yaml, or a path"
flags=("$@")

# Metrics, events, the layout and the checkpoints of the run. A shared file system, if there are several nodes.
RUN_DIR=${RUN_DIR:-runs/$(basename -- "$recipe" .yaml)}

# The layout: a config file with the sizes of parallelism; none (the recipe and the flags say it all); or auto, what
# tools/plan_run.py finds best for GPUs of the kind GPU, once for a run.
LAYOUT=${LAYOUT:-auto}
GPU=${GPU:-H100}

# choose_layout GPUS: after it, ${configs[@]} are the config files of the run.
choose_layout() {
  local file=$RUN_DIR/layout_$1x$GPU.yaml
  configs=("$recipe")
  case $LAYOUT in
    none) return ;;
    auto) ;;
    *) file=$LAYOUT ;;
  esac
  if [ "$LAYOUT" = auto ] && [ ! -f "$file" ]; then
    mkdir -p -- "$RUN_DIR"
    # Every node that starts may come by here, and finds the same.
    local draft=$file.$HOSTNAME.$$
    "$PYTHON" tools/plan_run.py --config "$recipe" "${flags[@]}" --gpus "$1" --gpu "$GPU" --yaml "$draft" || exit
    mv -- "$draft" "$file"
  fi
  [ -f "$file" ] || refuse "there is no layout $file; set LAYOUT to a config file, to none or to auto"
  configs+=("$file")
}

# pretrain OPTIONS OF TORCHRUN: become torchrun, which starts this node's ranks. With DRY_RUN=1 print the command
# instead and, on this process alone, build the model of the whole job's first and last rank.
pretrain() {
  local training=(examples/pretrain_gpt.py --config "${configs[@]}")
  local folders=(--run-dir "$RUN_DIR" --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints")
  local launch=("$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout "$SHUTDOWN_TIMEOUT" "$@")
  if [ "${DRY_RUN:-0}" = 1 ]; then
    show "${launch[@]}" "${training[@]}" "${folders[@]}" "${flags[@]}"
    exec "$PYTHON" "${training[@]}" "${flags[@]}" --dry-run --world-size $((NPROC_PER_NODE * ${NNODES:-1}))
  fi
  exec "${launch[@]}" "${training[@]}" "${folders[@]}" "${flags[@]}"
}
