#!/usr/bin/env bash
# Makes .venv from the lock files. Called by every make target; returns at once when there is nothing to do.
#
#   launch/bootstrap.sh [EXTRA ...]     extras besides dev: gpu plan wandb huggingface lm-eval docs
#
# .venv counts as done only when its last step has left a stamp that names these lock files, this folder and this Python,
# so an interrupted set-up is started anew. PYTHON names the interpreter to use. One line says what is wrong; pip's own
# words are in .cache/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."

log=.cache/setup.log

fail() {
    echo "error: $*" >&2
    exit 1
}

digest() {  # of what decides a .venv's content
    { cat setup.cfg "$@"; pwd; } | sha256sum | cut -d' ' -f1
}

suitable() {  # whether $1 runs, is new enough and can make virtual environments
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" && echo "$PYTHON" && return
        fail "PYTHON=$PYTHON is not a Python 3.12 or newer with the venv module; name another one."
    fi
    for candidate in python3 python3.12 python3.13 python3.14 python "$(uv python find '>=3.12' 2>/dev/null || true)" \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python /usr/bin/python3; do
        if [ -n "$candidate" ] && suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    local found
    found=$(python3 --version 2>/dev/null) || found='no python3'
    fail "MixCon-JAX needs Python 3.12 or newer with the venv module, and here is $found:" \
        "install one (for instance with \`uv python install 3.12\` or \`pyenv install 3.12\`) or name it with PYTHON=/path/to/python3.12."
}

install() {  # what a message calls it, then pip's arguments; --no-compile halves the time, Python compiles what is imported
    local what=$1
    shift
    .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile "$@" >>"$log" 2>&1 && return
    if grep -qiE 'connection|name resolution|timed out|timeout|proxy|network|no matching distribution' "$log"; then
        fail "$what could not be downloaded: is there a network, and does pip reach its package index? (pip's words: $log)"
    fi
    fail "$what could not be installed; pip's words are in $log."
}

done_already() {
    local extra
    [ -x .venv/bin/python ] && [ "$(cat .venv/.ready 2>/dev/null)" = "$(digest requirements.lock)" ] || return 1
    for extra in "$@"; do
        [ "$(cat ".venv/.ready-$extra" 2>/dev/null)" = "$(digest "requirements-$extra.lock")" ] || return 1
    done
}

for extra in "$@"; do
    [ -f "requirements-$extra.lock" ] || fail "there is no extra '$extra'; the extras are gpu, plan, wandb, huggingface and docs."
done
if done_already "$@"; then exit 0; fi

mkdir -p .cache
if command -v flock >/dev/null; then  # two makes at once: the second waits, then finds it done
    exec 9>.cache/setup.lock
    flock --nonblock 9 || { echo 'Waiting for another set-up of this folder ...' >&2; flock 9; }
    if done_already "$@"; then exit 0; fi
fi
: >"$log"

if [ -e .venv/.incomplete ] || ! suitable .venv/bin/python; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version) (about a minute) ..." >&2
    rm -rf .venv
    mkdir .venv && touch .venv/.incomplete
    "$python" -m venv .venv >>"$log" 2>&1 || fail "$python could not make .venv; its words are in $log."
else
    echo 'Updating .venv ...' >&2
fi
touch .venv/.incomplete
if [ "$(cat .venv/.ready 2>/dev/null)" != "$(digest requirements.lock)" ]; then
    rm -f .venv/.ready*
    install 'the locked packages' --require-hashes -r requirements.lock
    install 'mixcon-jax itself' --no-deps --no-build-isolation --editable .
    digest requirements.lock >.venv/.ready
fi
for extra in "$@"; do
    install "the packages of the extra '$extra'" --require-hashes -r "requirements-$extra.lock"
    digest "requirements-$extra.lock" >".venv/.ready-$extra"
done
rm .venv/.incomplete
