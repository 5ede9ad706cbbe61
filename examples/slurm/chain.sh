#!/usr/bin/env bash
# Submit a run as a chain of jobs, of which one goes on where the last one stopped, until the tokens are trained: for
# clusters that do not let a job requeue itself.
#
#   bash examples/slurm/chain.sh 10 --nodes 8 --time 4:00:00 -- dense_d24 --data-path data/corpus \
#     --tokenizer-model data/tokenizer.model
#
# That is the number of jobs, options of sbatch, --, and the words of pretrain.sbatch. The jobs have one name
# (CHAIN, unless it is set: chain-RECIPE-SECONDS), by which Slurm runs one of them at a time, and by which the job that
# ends the run, or gets no further, cancels the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
jobs=${1-} options=()
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "error: the number of jobs is '$jobs'; give 1 or more" >&2; exit 2; }
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
[ $# -gt 1 ] || { echo "error: no recipe; give options of sbatch, then --, then a recipe and its flags" >&2; exit 2; }
shift
export CHAIN=${CHAIN:-chain-$(basename -- "$1" .yaml)-$(date +%s)}
for ((job = 1; job <= jobs; job++)); do
  sbatch --job-name="$CHAIN" --dependency=singleton --no-requeue "${options[@]}" examples/slurm/pretrain.sbatch "$@"
done
