#!/usr/bin/env bash
# Runs the tests, in .venv, which it makes if needed. Arguments go to pytest: ./test.sh -k merge
# WORKERS sets how many files of tests run side by side (default: one more than there are cores, since many wait; at
# most 8); WORKERS=0 runs one test after another in one process, as a debugger needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source runtime/venv.sh
ensure_venv requirements-dev.txt
cores=$(nproc)
workers=${WORKERS:-$((cores < 8 ? cores + 1 : 8))}
exec "$VENV_PYTHON" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
