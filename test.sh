#!/usr/bin/env bash
# Runs the tests, in .venv, which it makes if needed. Arguments go to pytest: ./test.sh -k merge
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source runtime/venv.sh
ensure_venv requirements-dev.txt
exec "$VENV_PYTHON" -m pytest "$@"
