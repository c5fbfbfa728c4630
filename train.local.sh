#!/usr/bin/env bash
# Trains a population on this machine and lets its best model speak. Nothing needs to be there but Python and a network
# for pip; paths are relative to this script's folder.
#
#     ./train.local.sh                          two minutes on the Python standard library's own sources
#     ./train.local.sh --max_minutes 30         every argument goes to train.py, after the ones below
#     RANKS=2 ./train.local.sh --data book.txt
#     ./train.local.sh --resume runs/local_20260101_120000          until Ctrl-C, or --max_minutes
#
# A rank that dies is restarted alone and goes on from its last save; a signal to stop ends that. At the end the status
# is 0 only if every rank was done.
#
# Ctrl-C once: every rank saves and leaves, and the results are shown; twice: they leave at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ ! -e runtime/launching.sh ]; then # sbatch runs a copy that lies elsewhere
    echo "error: expected the script in the project's folder, got a copy in $PWD: sbatch --wrap ./train.local.sh" >&2
    exit 2
fi

# Settings; the environment overrides them. RANKS: default one per GPU, else 4; as many as it had for a run that is
# resumed. THREADS_PER_RANK: default cores / RANKS.
RANKS=${RANKS:-}
THREADS_PER_RANK=${THREADS_PER_RANK:-}
CORPUS=${CORPUS:-corpus/python_stdlib.txt}
BATCH_SIZE=${BATCH_SIZE:-16}
CHUNK_SIZE=${CHUNK_SIZE:-64}
SAVE_EVERY=${SAVE_EVERY:-200}
VAL_EVERY=${VAL_EVERY:-200}
MIXING_RATE=${MIXING_RATE:-0.05}
MERGE_METHOD=${MERGE_METHOD:-average}
# A model that two CPU cores can teach something in two minutes, and its rate; given another model, train.py's defaults.
MODEL=${MODEL:---dim 96 --depth 3 --ff_mult 2 --no_enable_conv --lr 0.01 --warmup_steps 50}
# What the best model goes on from; empty: it is not asked.
SAMPLE_PROMPT=${SAMPLE_PROMPT-"def "}
SAMPLE_BYTES=${SAMPLE_BYTES:-300}

arguments=("$@")
source runtime/launching.sh
# Settings as well; a run that is resumed has its own host, and no limit, unless they are set.
if ! given --resume; then
    if ! given --train_steps --train-steps; then MAX_MINUTES=${MAX_MINUTES:-2}; fi
    GOSSIP_HOST=${GOSSIP_HOST:-127.0.0.1}
fi
ensure_venv requirements.txt
if given --help -h; then
    exec "$VENV_PYTHON" train.py --help
fi
choose_run "runs/local_$(date +%Y%m%d_%H%M%S)"

if [ -z "$RANKS" ]; then
    RANKS=$("$VENV_PYTHON" -c 'import torch; print(torch.cuda.device_count() or 4)')
fi
run_ranks --ranks "$RANKS" ${THREADS_PER_RANK:+--threads_per_rank "$THREADS_PER_RANK"} \
    -- train.py ${MAX_MINUTES:+--max_minutes "$MAX_MINUTES"} ${GOSSIP_HOST:+--gossip_host "$GOSSIP_HOST"} \
    "${FLAGS[@]}" "$@"

# 130, 143: who sends a second signal does not wait for a table.
case $STATUS in 130 | 143) exit "$STATUS" ;; esac
"$VENV_PYTHON" watch.py "$RUN_DIR" --once || STATUS=$((STATUS ? STATUS : $?))
if [ -n "$SAMPLE_PROMPT" ]; then
    # A young model may well write control characters, which are not for a terminal.
    "$VENV_PYTHON" generate.py --model "$RUN_DIR" --prompt "$SAMPLE_PROMPT" --max_length "$SAMPLE_BYTES" |
        LC_ALL=C tr -d '\000-\010\013-\037\177' || STATUS=$((STATUS ? STATUS : $?))
    echo
fi
exit "$STATUS"
