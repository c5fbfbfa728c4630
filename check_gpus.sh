#!/usr/bin/env bash
# Are this machine's GPUs fit to train on? NVIDIA, AMD or none: what is there, with which driver and memory, whether
# torch's build goes with it, what training computes on each (a matrix product, the recurrence there and back, a step of
# the optimizer), free disk, and whether two ranks meet here.
#
#     ./check_gpus.sh [--scratch DIR] [--output DIR] [--gossip_host hsn0] [--no_ranks]
#
# The last line begins with "ok:" or "failed:". Status 0: GPUs that work; 3: no GPU, and all else works; 1: a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source runtime/venv.sh

if command -v rocm-smi >/dev/null && ! command -v nvidia-smi >/dev/null; then
    ensure_venv rocm-reqs.txt
else
    ensure_venv requirements.txt
fi
exec "$VENV_PYTHON" check_gpus.py "$@"
