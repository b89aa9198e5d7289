#!/usr/bin/env bash
# Runs ruff, mypy, shellcheck and the tests in a virtual environment of its own.
#   bash launch/test.sh          tests that need no other libraries: some minutes
#   bash launch/test.sh --all    all tests: parity with PyTorch models (installs torch, transformers, timm: 1 GB and
#                                more), ahead-of-time compilation for TPUs (libtpu: 0.7 GB), the accuracy of the demo,
#                                end-to-end training, the report and the documentation in Chromium, the notebook with
#                                Colab's versions
#   bash launch/test.sh -k NAME  further arguments go to pytest; -n0 runs all tests in one process
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
parallel=(-n auto --maxprocesses=4 --dist loadfile)  # the tests of a file share compiled functions

if [[ ${1:-} == --all ]]; then
  shift
  environment .venv-all test,slow,plan,docs
  .venv-all/bin/python -m pytest "${parallel[@]}" --slow "$@"
else
  environment .venv-test test
  .venv-test/bin/python -m ruff check .
  .venv-test/bin/python -m ruff format --check .
  .venv-test/bin/python -m mypy
  .venv-test/bin/shellcheck -x launch/*.sh .ci/run
  .venv-test/bin/python -m pytest "${parallel[@]}" "$@"
fi
