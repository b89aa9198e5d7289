#!/usr/bin/env bash
# Checks the code and runs the tests in a virtual environment of their own.
#   bash launch/test.sh          everything that needs the pinned requirements alone
#   bash launch/test.sh --all    and the slow tests: the demo's accuracy, from files to results
#   bash launch/test.sh -k NAME  pytest's arguments are passed on
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

environment .venv-test requirements.txt requirements-test.txt
python=.venv-test/bin/python
arguments=()
for argument in "$@"; do
  if [[ $argument == --all ]]; then arguments+=(--slow); else arguments+=("$argument"); fi
done
$python -m ruff check .
$python -m ruff format --check .
$python -m mypy
$python -m pytest "${arguments[@]}"
