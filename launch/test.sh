#!/usr/bin/env bash
# Checks the code and runs the tests, in a virtual environment of their own.
#   bash launch/test.sh          what needs the pinned requirements alone: some minutes
#   bash launch/test.sh --all    and parity with PyTorch's models (installs torch, transformers, timm: 1 GB and more),
#                                programs for TPUs that are not here (libtpu: 0.7 GB), the demo's accuracy, from files
#                                to results, the report in Chromium, the notebook
#   bash launch/test.sh -k NAME  pytest's arguments are passed on; -n0 runs all in one process
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
parallel=(-n auto --maxprocesses=4 --dist loadfile)  # a file's tests share what they compile

if [[ ${1:-} == --all ]]; then
  shift
  environment .venv-all requirements.txt requirements-test.txt requirements-parity.txt requirements-plan.txt
  .venv-all/bin/python -m pytest "${parallel[@]}" --slow "$@"
else
  environment .venv-test requirements.txt requirements-test.txt
  .venv-test/bin/python -m ruff check .
  .venv-test/bin/python -m ruff format --check .
  .venv-test/bin/python -m mypy
  .venv-test/bin/shellcheck -x launch/*.sh .ci/run
  .venv-test/bin/python -m pytest "${parallel[@]}" "$@"
fi
