#!/usr/bin/env bash
# Trains a population on this machine and lets its best model speak. Nothing needs to be there but Python and a network
# for pip; paths are relative to this script's folder.
#
#     ./train.local.sh                          two minutes on the Python standard library's own sources
#     ./train.local.sh --max_minutes 30         every argument goes to train.py, after the ones below
#     RANKS=2 ./train.local.sh --data book.txt
#     ./train.local.sh --resume runs/local_20260101_120000
#
# A rank that dies is restarted alone and goes on from its last save; a signal to stop ends that. At the end the status
# is 0 only if every rank was done.
#
# Ctrl-C once: every rank saves and leaves, and the results are shown; twice: they leave at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Settings; the environment overrides them. RANKS: default one per GPU, else 4. THREADS_PER_RANK: default cores / RANKS.
RANKS=${RANKS:-}
THREADS_PER_RANK=${THREADS_PER_RANK:-}
CORPUS=${CORPUS:-corpus/python_stdlib.txt}
MAX_MINUTES=${MAX_MINUTES:-2}
BATCH_SIZE=${BATCH_SIZE:-16}
CHUNK_SIZE=${CHUNK_SIZE:-64}
SAVE_EVERY=${SAVE_EVERY:-200}
VAL_EVERY=${VAL_EVERY:-200}
MIXING_RATE=${MIXING_RATE:-0.05}
MERGE_METHOD=${MERGE_METHOD:-average}
# A model that two CPU cores can teach something in two minutes, and its rate; given another model, train.py's defaults.
MODEL=${MODEL:---dim 96 --depth 3 --ff_mult 2 --lr 0.01 --warmup_steps 50}
GOSSIP_HOST=${GOSSIP_HOST:-127.0.0.1}
SAMPLE_PROMPT=${SAMPLE_PROMPT:-"def "}
SAMPLE_BYTES=${SAMPLE_BYTES:-300}

source runtime/venv.sh
ensure_venv requirements.txt

# given NAME ...: is one of these flags among the arguments? Leaves the last one's value in VALUE.
given() {
    local name argument previous= found=1
    for argument in "${arguments[@]}"; do
        for name in "$@"; do
            case $previous in "$name") VALUE=$argument ;; esac
            case $argument in
            "$name") found=0 ;;
            "$name="*) found=0 VALUE=${argument#*=} ;;
            esac
        done
        previous=$argument
    done
    return "$found"
}

arguments=("$@")
VALUE=
if given --help -h; then
    exec "$VENV_PYTHON" train.py --help
fi

defaults=(--max_minutes "$MAX_MINUTES" --gossip_host "$GOSSIP_HOST")
if given --resume; then # the rest is as the run was started
    run_dir=$VALUE
else
    run_dir=runs/local_$(date +%Y%m%d_%H%M%S)
    defaults+=(--output "$run_dir" --batch_size "$BATCH_SIZE" --chunk_size "$CHUNK_SIZE" --save_every "$SAVE_EVERY"
        --val_every "$VAL_EVERY" --gossip_mixing_rate "$MIXING_RATE" --gossip_merge_method "$MERGE_METHOD")
    if given --output; then run_dir=$VALUE; fi
    # shellcheck disable=SC2206  # words, not one word
    if ! given --params --dim --depth --init_from --init-from; then defaults+=($MODEL); fi
    if ! given --data; then
        if [ ! -e "$CORPUS" ]; then
            "$VENV_PYTHON" prepare_data.py --python_stdlib --output "$CORPUS"
        fi
        defaults+=(--data "$CORPUS")
    fi
fi

if [ -z "$RANKS" ]; then
    RANKS=$("$VENV_PYTHON" -c 'import torch; print(torch.cuda.device_count() or 4)')
fi

# The launcher gets a process group of its own: a signal then reaches it once, through this script.
launcher=
forward() {
    if [ -n "$launcher" ]; then kill -s "$1" "$launcher" 2>/dev/null || true; fi
}
for signal in INT TERM HUP USR1; do
    # shellcheck disable=SC2064  # the signal of this round
    trap "forward $signal" "$signal"
done
set -m
"$VENV_PYTHON" -m runtime.launch --ranks "$RANKS" ${THREADS_PER_RANK:+--threads_per_rank "$THREADS_PER_RANK"} \
    -- train.py "${defaults[@]}" "$@" &
launcher=$!
set +m
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" || true # a signal ends this wait, but not the launcher
done
status=0
wait "$launcher" || status=$?
trap - INT TERM HUP USR1

# 130, 143: who sends a second signal does not wait for a table.
case $status in 130 | 143) exit "$status" ;; esac
if [ "$status" -eq 2 ] && [ ! -e "$run_dir/latest.pt" ]; then exit 2; fi # nothing was trained
"$VENV_PYTHON" watch.py "$run_dir" --once || status=$((status ? status : $?))
if [ -n "$SAMPLE_PROMPT" ]; then
    # A young model may well write control characters, which are not for a terminal.
    "$VENV_PYTHON" generate.py --model "$run_dir" --prompt "$SAMPLE_PROMPT" --max_length "$SAMPLE_BYTES" |
        LC_ALL=C tr -d '\000-\010\013-\037\177' || status=$((status ? status : $?))
    echo
fi
exit "$status"
