#!/usr/bin/env bash
# Trains a population on this machine's NVIDIA GPUs: one process for each, restarted alone when it dies.
#
#     ./train.cuda.sh --data corpus/library.txt --train_steps 200k
#     RANKS=2 BATCH_SIZE=4 ./train.cuda.sh       settings come from the environment, the arguments go to train.py
#     CUDA_VISIBLE_DEVICES=2,3 ./train.cuda.sh   some of the GPUs
#     ./train.cuda.sh --resume runs/cuda_20260101_120000
#
# Ctrl-C or SIGTERM once: every rank saves and leaves, and the table is shown; twice: they leave at once. At the end the
# status is 0 only if every rank was done. ./check_gpus.sh says whether the GPUs are fit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ ! -e runtime/launching.sh ]; then # sbatch runs a copy that lies elsewhere
    echo "error: expected the script in the project's folder, got a copy in $PWD: sbatch --wrap ./train.cuda.sh" >&2
    exit 2
fi

# Settings; the environment overrides them. RANKS: default one per GPU; as many as it had for a run that is resumed.
# THREADS_PER_RANK: default cores / RANKS.
# CORES: the cores of each rank, as "0-7 8-15"; default: those near its GPU, shared with the ranks whose GPUs they are
# near to as well.
RANKS=${RANKS:-}
THREADS_PER_RANK=${THREADS_PER_RANK:-}
CORES=${CORES:-}
MODEL=${MODEL:---params 1g --dim 1024 --expansion_factor 3.0 --ff_mult 1.5}
BATCH_SIZE=${BATCH_SIZE:-8}
CHUNK_SIZE=${CHUNK_SIZE:-2048}
SAVE_EVERY=${SAVE_EVERY:-2000}
VAL_EVERY=${VAL_EVERY:-1000}
MIXING_RATE=${MIXING_RATE:-0.01}
MERGE_METHOD=${MERGE_METHOD:-recombination}
ALPHA=${ALPHA:-0.3}
MAX_RESTARTS=${MAX_RESTARTS:-5}
CORPUS=${CORPUS:-corpus/python_stdlib.txt}

arguments=("$@")
source runtime/launching.sh
# Settings as well; a run that is resumed has its own, unless they are set.
if ! given --resume; then
    DEVICE=${DEVICE:---cuda}
    GOSSIP_HOST=${GOSSIP_HOST:-127.0.0.1}
fi
ensure_venv requirements.txt
if given --help -h; then
    exec "$VENV_PYTHON" train.py --help
fi
if [ -z "$CORES" ]; then
    CORES=$("$VENV_PYTHON" -m runtime.gpu_cores)
fi
# shellcheck disable=SC2206  # words, not one word
cores=($CORES)
choose_run "runs/cuda_$(date +%Y%m%d_%H%M%S)"
ulimit -n "$(ulimit -H -n)" # sockets, and a descriptor for each mapped file

run_ranks --ranks "${RANKS:-${#cores[@]}}" --cores "${cores[@]}" --max_restarts "$MAX_RESTARTS" \
    ${THREADS_PER_RANK:+--threads_per_rank "$THREADS_PER_RANK"} \
    -- train.py ${DEVICE:+"$DEVICE"} ${GOSSIP_HOST:+--gossip_host "$GOSSIP_HOST"} "${FLAGS[@]}" "$@"

case $STATUS in 130 | 143) exit "$STATUS" ;; esac # a second signal
"$VENV_PYTHON" watch.py "$RUN_DIR" --once || STATUS=$((STATUS ? STATUS : $?))
exit "$STATUS"
