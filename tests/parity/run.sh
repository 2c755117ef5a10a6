#!/usr/bin/env bash
# `make parity`: recomputes the fixtures with transformers in an environment of its own, compares them with the committed
# ones, loads what `mixcon export` writes there, and runs the parity tests on the new ones. PARITY_PYTHON names a Python
# 3.11 or newer for that environment.
set -euo pipefail
cd "$(dirname "$0")/../.."

environment=.cache/parity-venv
packages='torch==2.13.0 transformers==5.23.0'

if [ "$(cat "$environment/.ready" 2>/dev/null)" != "$packages" ]; then
    # The CPU build of torch comes as one wheel for each Python; take the first Python for which pip finds it.
    for python in ${PARITY_PYTHON:-"${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11.*/bin/python python3.11 .venv/bin/python}; do
        command -v "$python" >/dev/null || continue
        echo "Making $environment with $("$python" --version) ..."
        rm -rf "$environment"
        if "$python" -m venv "$environment" && "$environment/bin/python" -m pip install --quiet $packages; then
            echo "$packages" >"$environment/.ready"
            break
        fi
    done
    [ -e "$environment/.ready" ] || { echo "error: $packages could not be installed; is there a network?" >&2; exit 1; }
fi

new=.cache/parity-fixtures
rm -rf "$new"
"$environment/bin/python" tests/parity/make_fixtures.py "$new"
echo 'Largest difference from the committed fixtures, as a share of each array:'
if .venv/bin/python -m tests.parity.compare tests/parity/fixtures "$new"; then
    echo 'The committed fixtures are up to date.'
else
    echo "error: the fixtures differ; if that is meant, copy $new/*.npz and $new/*/config.json to tests/parity/fixtures/" >&2
    exit 1
fi
exports=.cache/parity-exports
rm -rf "$exports"
.venv/bin/python -m tests.parity.exports "$exports" >/dev/null
echo 'What mixcon export writes, as transformers loads it:'
"$environment/bin/python" tests/parity/load_exports.py "$exports"
MIXCON_PARITY_FIXTURES="$PWD/$new" exec .venv/bin/python -m pytest -q tests/parity
