# The project's own Python environment, .venv: made where it is missing, kept in step with the requirements.
# Source this with the project's folder as the current one; it sets VENV_PYTHON. PYTHON: which Python to build from.

VENV_PYTHON=.venv/bin/python

# ensure_venv FILE: make .venv and install FILE there, unless that version of the requirements is installed already.
ensure_venv() {
    local requirements=$1 stamp=.venv/installed_$1
    if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        make_venv || return
    fi
    if [ "$(cat "$requirements" requirements*.txt)" != "$(cat "$stamp" 2>/dev/null)" ]; then
        echo "installing $requirements into .venv" >&2
        local quiet=--quiet
        if [ -t 2 ]; then quiet=--progress-bar=on; fi # gigabytes, where torch brings a GPU's libraries
        "$VENV_PYTHON" -m pip install "$quiet" --disable-pip-version-check -r "$requirements" >&2 || return
        cat "$requirements" requirements*.txt >"$stamp"
    fi
}

make_venv() {
    local base=${PYTHON:-python3}
    if [ "$(uname)" != Linux ]; then
        echo "error: expected Linux, got $(uname): nothing here was written for another system" >&2
        return 2
    fi
    # What the pinned packages are built for.
    if ! "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
        echo "error: expected Python 3.10 to 3.13 as $base: install one, or name another by PYTHON=..." >&2
        return 2
    fi
    echo "making .venv" >&2
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv --clear .venv
    elif "$base" -m pip --version >/dev/null 2>&1; then
        # Some distributions cut ensurepip out of their Python; a pip of its own can stand in.
        "$base" -m venv --clear --without-pip .venv &&
            "$base" -m pip --python "$VENV_PYTHON" install --quiet --disable-pip-version-check pip
    else
        echo "error: expected a Python with ensurepip or pip, got $base with neither: install python3-venv" >&2
        return 2
    fi
}
