#!/usr/bin/env bash
# Writes requirements.lock (the library and its dev extra) and one requirements-EXTRA.lock for every other extra, all of
# the same versions. Arguments go to uv: --upgrade, or --upgrade-package NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND='make lock'
compile=(.venv/bin/uv pip compile setup.cfg --universal --python-version 3.12 --generate-hashes --no-emit-index-url --quiet)
"${compile[@]}" --extra dev "$@" --output-file requirements.lock
# The others hold the library too, so that each can be installed on its own; uv keeps to the versions already locked.
for extra in gpu plan wandb huggingface lm-eval docs; do
    "${compile[@]}" --extra "$extra" --constraints requirements.lock "$@" --output-file "requirements-$extra.lock"
done
