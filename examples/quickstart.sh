#!/usr/bin/env bash
# Set up, then pretrain a small HyperP model on text that is on this machine, with two tensor-parallel ranks:
# install into .venv, train a tokenizer, make a corpus, train half way, resume, report the run.
# With --moe as the first argument it is a mixture of experts with two expert-parallel ranks.
# PYTHON=python3.12 in the environment chooses the Python, and with it Megatron-Core (docs/versions.md).
# Further arguments go to the training, for example: bash examples/quickstart.sh --optimizer adamw --eta0 0.003
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart
model=(--config examples/configs/quickstart.yaml --tensor-model-parallel-size 2)
if [ "${1-}" = --moe ]; then
  shift
  run=runs/quickstart-moe
  model=(--config examples/configs/quickstart_moe.yaml --expert-model-parallel-size 2)
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-}" # on CPU, also where there are GPUs
started=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

step "1/5 install into .venv"
make --no-print-directory setup
python=.venv/bin/python

if [ -e "$run" ]; then
  old="$run-$(date -r "$run" +%Y%m%d-%H%M%S)"
  mv "$run" "$old"
  echo "kept the earlier run as $old"
fi
mkdir -p "$run/data"

step "2/5 tokenizer and corpus: source and documentation of the installed Python"
$python tools/train_tokenizer.py --python-corpus --max-bytes 20MB --vocab-size 2048 --output "$run/data/tokenizer"
$python tools/preprocess_data.py --python-corpus --max-bytes 20MB --tokenizer "$run/data/tokenizer.model" \
  --output-prefix "$run/data/python" --workers 2

train() {
  .venv/bin/torchrun --standalone --nproc-per-node 2 examples/pretrain_gpt.py "${model[@]}" \
    --data-path "$run/data/python" --tokenizer-model "$run/data/tokenizer.model" \
    --run-dir "$run" --save "$run/checkpoints" --load "$run/checkpoints" "$@"
}
step "3/5 train to iteration 150 and stop"
train --exit-interval 150 "$@"
step "4/5 resume from the checkpoint and finish"
train "$@"

step "5/5 report the run"
$python tools/report.py "$run"

cat <<END

Done in $((SECONDS - started)) s. In $run:
  report.html    losses, stability by layer, settings: open it in a browser
  report.png     losses, learning rate, gradient norm, speed, radius drift     metrics.jsonl  the same as numbers
  config.yaml    every setting, as resolved                                    checkpoints/   any layout can load them
Next:
  with experts   bash examples/quickstart.sh --moe
  a baseline     bash examples/quickstart.sh --optimizer adamw --eta0 0.003
  your text      .venv/bin/python tools/preprocess_data.py --help
  the paper      .venv/bin/python examples/pretrain_gpt.py --help    (--depth 8 is its base model)
END
