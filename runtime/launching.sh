# What the launch scripts share. Source this with the project's folder as the current one and the script's arguments in
# the array "arguments"; settings are variables of the script that sources it.

source runtime/venv.sh

# given NAME ...: is one of these flags among the arguments? Leaves the last one's value in VALUE, empty without one.
given() {
    local name argument previous= found=1
    for argument in "${arguments[@]}"; do
        for name in "$@"; do
            case $previous in "$name") VALUE=$argument ;; esac
            case $argument in
            "$name") found=0 VALUE= ;;
            "$name="*) found=0 VALUE=${argument#*=} ;;
            esac
        done
        previous=$argument
    done
    return "$found"
}

# choose_run DEFAULT: the run directory in RUN_DIR, that of the arguments or DEFAULT, and the settings as flags of
# train.py in FLAGS. A run that is resumed goes on as it was started, with as many ranks unless RANKS is set: only the
# arguments change it.
choose_run() {
    RUN_DIR=$1 FLAGS=()
    if given --resume; then
        take_folder --resume
        if [ -z "${RANKS:-}" ]; then
            # Without such a file train.py says what is wrong.
            RANKS=$(sed -n 's/^  "world_size": \([0-9]*\).*/\1/p' -- "$RUN_DIR/config.json" 2>/dev/null || true)
        fi
        return
    fi
    if given --output; then take_folder --output; fi
    FLAGS=(--output "$RUN_DIR" --batch_size "$BATCH_SIZE" --chunk_size "$CHUNK_SIZE" --save_every "$SAVE_EVERY"
        --val_every "$VAL_EVERY" --gossip_mixing_rate "$MIXING_RATE" --gossip_merge_method "$MERGE_METHOD")
    if ! given --gossip_merge_method --gossip-merge-method; then VALUE=$MERGE_METHOD; fi
    if [ "$VALUE" = recombination ] && [ -n "${ALPHA:-}" ]; then FLAGS+=(--gossip_recombination_alpha "$ALPHA"); fi
    # shellcheck disable=SC2206  # words, not one word
    if ! given --params --dim --depth --init_from --init-from; then FLAGS+=($MODEL); fi
    if ! given --data; then
        ensure_corpus "$CORPUS" || return
        FLAGS+=(--data "$CORPUS")
    fi
}

# take_folder FLAG: the flag's value, which given has just left, as the run directory.
take_folder() {
    if [ -z "$VALUE" ]; then
        echo "error: expected a folder after $1, got none: name it" >&2
        exit 2
    fi
    RUN_DIR=$VALUE
}

# ensure_corpus FILE: make it from the Python standard library's own sources, unless there is one.
ensure_corpus() {
    if [ ! -e "$1" ]; then
        "$VENV_PYTHON" prepare_data.py --python_stdlib --output "$1"
    fi
}

# run_ranks ARGUMENT ...: the launcher with these arguments, until it ends; its status in STATUS.
run_ranks() {
    local before
    before=$(readlink -- "$RUN_DIR/latest.pt" || true)
    # The launcher gets a process group of its own: a signal then reaches it once, through this script.
    local signal launcher=
    for signal in INT TERM HUP USR1 USR2; do
        # shellcheck disable=SC2064  # the signal of this round
        trap "[ -z \"\$launcher\" ] || kill -s $signal \"\$launcher\" 2>/dev/null || true" "$signal"
    done
    set -m
    "$VENV_PYTHON" -m runtime.launch "$@" &
    launcher=$!
    set +m
    while kill -0 "$launcher" 2>/dev/null; do
        wait "$launcher" || true # a signal ends this wait, but not the launcher
    done
    STATUS=0
    wait "$launcher" || STATUS=$?
    trap - INT TERM HUP USR1 USR2
    # A mistake, and nothing was trained: its line is not to be buried under a table of what was there before.
    if [ "$STATUS" -eq 2 ] && [ "$(readlink -- "$RUN_DIR/latest.pt" || true)" = "$before" ]; then exit 2; fi
}
