#!/usr/bin/env bash
# Trains a population on Frontier (OLCF), or on another Slurm cluster of such nodes: one rank for each of a node's eight
# AMD GPUs, restarted alone when it dies; saved before the time limit, requeued, and resumed until --train_steps.
#
#     ./train.frontier.sh                        on a login node, once: makes .venv with torch for ROCm
#     sbatch train.frontier.sh --train_steps 200k --data /lustre/orion/abc123/proj-shared/corpus
#     sbatch -N 8 -A abc123 train.frontier.sh    sbatch's own options go before the script, train.py's after it
#     sbatch train.frontier.sh --resume runs/frontier_1234567
#
# Submit from the project's folder, on the parallel filesystem. docs/clusters.md says what happens when, and what of
# this was never tried on the machine itself.
#
#SBATCH --job-name=gruboros
#SBATCH --account=abc123
#SBATCH --partition=batch
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=7
#SBATCH --gpus-per-node=8
#SBATCH --constraint=nvme
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm_%j.out
set -euo pipefail

# Settings; the environment overrides them.
MODEL=${MODEL:---params 1g --dim 1024 --expansion_factor 3.0 --ff_mult 1.5}
# Half of train.cuda.sh's: what the backward pass needs of a layer is some 43 kB a byte read, so of 79 layers and 4 lanes
# 28 GB, beside 22 GB that do not depend on it; a GPU here has 64 GiB. More lanes want --checkpoint_layers.
BATCH_SIZE=${BATCH_SIZE:-4}
CHUNK_SIZE=${CHUNK_SIZE:-2048}
SAVE_EVERY=${SAVE_EVERY:-2000}
VAL_EVERY=${VAL_EVERY:-1000}
MIXING_RATE=${MIXING_RATE:-0.01}
MERGE_METHOD=${MERGE_METHOD:-recombination}
ALPHA=${ALPHA:-0.3}
CORPUS=${CORPUS:-corpus/python_stdlib.txt}
# VENV: the environment to stage. NVME: a folder on the node-local disk, made if need be. MODULES: loaded where there is
# a module command.
VENV=${VENV:-.venv}
NVME=${NVME:-/mnt/bb/${USER:-$(id -un)}}
MODULES=${MODULES-PrgEnv-gnu rocm craype-accel-amd-gfx90a}
# Seconds that the ranks have for saving before the time limit: less than in --signal, by a minute or two.
SAVE_SECONDS=${SAVE_SECONDS:-480}
# Which GPU and which cores the tasks 0 ... 7 of a node get. Task t has the seven free cores of the t-th group of eight
# that share an L3 cache (the first is the system's), and the GPU that is nearest to it: Frontier User Guide, "Frontier
# Compute Nodes".
GPU_BIND=${GPU_BIND:-map_gpu:4,5,2,3,6,7,0,1}
EIGHT_GROUPS=0xfe,0xfe00,0xfe0000,0xfe000000,0xfe00000000,0xfe0000000000,0xfe000000000000,0xfe00000000000000
CPU_BIND=${CPU_BIND:-mask_cpu:$EIGHT_GROUPS}

# Slurm runs a copy of this script that lies elsewhere.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")}"
if [ ! -e runtime/launching.sh ]; then
    echo "error: expected sbatch in the project's folder, got $PWD: cd there and submit again" >&2
    exit 2
fi
arguments=("$@")
source runtime/launching.sh
# Settings as well; a run that is resumed has its own, unless they are set.
if ! given --resume; then
    DEVICE=${DEVICE:---rocm}
    GOSSIP_HOST=${GOSSIP_HOST:-hsn0}
fi

say() { echo "$(date '+%Y-%m-%d %H:%M:%S') $*" >&2 || true; } # a log that cannot be written ends nothing

if given --help -h; then
    sed -n '2,/^#SBATCH/{/^#SBATCH/d; s/^# \{0,1\}//; p}' train.frontier.sh
    exit 0
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    if [ "${#arguments[@]}" -ne 0 ]; then
        echo "error: expected a job or no arguments, got ${arguments[*]}: give them to sbatch train.frontier.sh" >&2
        exit 2
    fi
    ensure_venv rocm-reqs.txt
    echo ".venv is ready: now sbatch train.frontier.sh [ARGUMENT ...]" >&2
    exit 0
fi

if [ -z "${SLURM_NTASKS_PER_NODE:-}" ]; then
    echo "error: expected a job of sbatch with --ntasks-per-node, got none: submit by sbatch train.frontier.sh" >&2
    exit 2
fi

if ! [[ $SAVE_SECONDS =~ ^[1-9][0-9]*$ ]]; then
    echo "error: expected SAVE_SECONDS as whole seconds, got '$SAVE_SECONDS': give it as 480" >&2
    exit 2
fi

if type module >/dev/null 2>&1; then
    set +u # the functions behind it are not written for -u
    # shellcheck disable=SC2086  # words, not one word
    if [ -n "$MODULES" ]; then module load $MODULES; fi
    set -u
fi
VENV_PYTHON=$VENV/bin/python
if [ ! -x "$VENV_PYTHON" ]; then
    echo "error: expected a Python environment in $VENV, got none: make it on a login node, see docs/clusters.md" >&2
    exit 2
fi
choose_run "runs/frontier_$SLURM_JOB_ID"
ranks=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE))

# The time limit is near: every rank is asked to save and leave, by a signal that does no harm if it comes twice. What
# failed here would end the job before it is requeued.
requeue=0 deadline=$((1 << 60))
LEAST_SECONDS=120 # of a life that does more than start
near_the_limit() {
    requeue=1 told=$SECONDS deadline=$((SECONDS + SAVE_SECONDS))
    printf -v asked '%(%s)T' -1
    scancel --signal=USR2 "$SLURM_JOB_ID" || say "warning: the ranks could not be told"
    say "the time limit is near: every rank saves and leaves"
}
trap near_the_limit USR1
# scancel, and the limit itself: Slurm tells the ranks as well, which save and leave; this waits for them.
trap 'say "asked to end: every rank saves and leaves"' TERM

# Hundreds of ranks that import torch from a shared filesystem take minutes: each node gets a copy of its own, in a
# folder of this job's, since another may share the node. Where that fails, the node's ranks take the shared one.
NVME=$NVME/gruboros_$SLURM_JOB_ID
on_each_node() { # SECONDS SCRIPT [ARGUMENT]
    # When a node has died: no number of tasks, which would not fit those that are left, and no wait for its last step.
    timeout "$1" env -u SLURM_NTASKS -u SLURM_NPROCS \
        srun --overlap --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 --wait=0 bash -c "$2" "$NVME" "${@:3}"
}
# shellcheck disable=SC2016  # for the nodes to expand, here and below
clear_nodes() { on_each_node 30 'rm -rf "$0"' || say "warning: $NVME may be left on a node"; }
say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $ranks ranks on $SLURM_JOB_NODELIST, in $RUN_DIR"
# shellcheck disable=SC2016
on_each_node 600 'rm -rf "$0"; mkdir -p "$0/cache/tmp" "$0/unpacked"' || true
if tar -C "$VENV" -cf "$NVME/made.tar" .; then sbcast --force "$NVME/made.tar" "$NVME/venv.tar" || true; fi
size=$(stat -c %s "$NVME/made.tar" || true)
rm -f "$NVME/made.tar" || true
# shellcheck disable=SC2016
staged=$(on_each_node 600 '
    set -e
    [ "$(stat -c %s "$0/venv.tar")" = "$1" ] # sbcast may have stopped half-way
    tar -C "$0/unpacked" -xf "$0/venv.tar"
    rm "$0/venv.tar"
    mv "$0/unpacked" "$0/venv"
    echo staged' "$size" | grep -c '^staged$') || true
if [ "$staged" = "$SLURM_NNODES" ]; then
    say "the environment is on every node"
else
    say "warning: the environment is on $staged of $SLURM_NNODES nodes: the ranks of the others take it from $VENV"
fi

status=0
if ! ((requeue)); then
    srun --no-kill --kill-on-bad-exit=0 --wait=0 --label --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        --cpu-bind="$CPU_BIND" --gpu-bind="$GPU_BIND" \
        bash -c '
            venv=$1
            if [ -d "$0/venv" ]; then
                venv=$0/venv
                export TMPDIR=$0/cache/tmp XDG_CACHE_HOME=$0/cache TRITON_CACHE_DIR=$0/cache/triton
                export MIOPEN_USER_DB_PATH=$0/cache/miopen MIOPEN_CUSTOM_CACHE_DIR=$0/cache/miopen
            fi
            exec "$venv/bin/python" -m runtime.launch --task -- train.py "${@:2}"' "$NVME" "$VENV" \
        ${DEVICE:+"$DEVICE"} ${GOSSIP_HOST:+--gossip_host "$GOSSIP_HOST"} "${FLAGS[@]}" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null && ((SECONDS < deadline)); do
        # A signal ends the wait, but not the step.
        if ((requeue)); then sleep 1; else wait "$step" || true; fi
    done
fi

if ((requeue)); then
    # A folder that is not there yet, or a file that goes meanwhile, must not keep the job from being requeued.
    saved=$(find "$RUN_DIR" -maxdepth 1 -name 'checkpoint_rank_*.pt' -newermt "@$asked" 2>/dev/null |
        sed 's/.*checkpoint_rank_\([0-9]*\).*/\1/' | sort -u | wc -l) || true
    say "$saved of $ranks ranks have saved since"
    if ((SECONDS >= deadline)); then
        say "warning: not every rank has left in $SAVE_SECONDS s"
    else
        clear_nodes
    fi
    short=logs/slurm_$SLURM_JOB_ID.short # a life of this job that did no more than start
    if ((told >= LEAST_SECONDS)); then
        rm -f "$short" || true
    elif [ -e "$short" ]; then
        say "error: not requeued: the time limit was near $told s after the start, again: give a longer --time"
        say "go on by sbatch train.frontier.sh --resume $RUN_DIR"
        exit 1
    else
        { mkdir -p logs && : >"$short"; } || true
    fi
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "error: not requeued: go on by sbatch train.frontier.sh --resume $RUN_DIR"
        exit 1
    fi
    exit 0
fi
wait "$step" || status=$?
clear_nodes
"$VENV_PYTHON" watch.py "$RUN_DIR" --once || status=$((status ? status : $?))
exit "$status"
