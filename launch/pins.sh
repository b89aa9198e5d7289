#!/usr/bin/env bash
# Writes the pinned versions for the dependencies of pyproject.toml: requirements.txt has the package's own, for CPU, and
# constraints.txt has those of all extras too, except beam, which needs older versions of some. Existing pins are kept.
#   bash launch/pins.sh                    after a change of pyproject.toml
#   bash launch/pins.sh --upgrade          the newest versions
#   bash launch/pins.sh -P jax==0.10.2     one of them
# Needs uv (pip install uv). Pins are those for Python 3.11, and work with 3.12 and 3.13 too.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
[[ ${1:-} == --help || ${1:-} == -h ]] && { usage; exit; }

pins() {  # pins FILE [uv's options]
  uv pip compile pyproject.toml --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-annotate \
    --custom-compile-command 'bash launch/pins.sh' --output-file "$@"
}

pins requirements.txt "$@"
extras=(--extra gpu --extra tpu --extra plan --extra torch --extra docs --extra test --extra slow --extra benchmarks)
pins constraints.txt --extra dev "${extras[@]}" --constraints requirements.txt "$@"
