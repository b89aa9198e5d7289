#!/usr/bin/env bash
# Runs the tests in fresh environments with other versions of Python and of the dependencies, and prints a table.
#   bash launch/matrix.sh                          all rows: half an hour and more
#   bash launch/matrix.sh newest colab             some rows
#   bash launch/matrix.sh lowest -- tests/models   further arguments go to pytest
# Rows: 3.11, 3.12 and 3.13 have the versions of constraints.txt, newest the newest of everything that Python 3.13 accepts,
# colab those of Colab's runtime, lowest the lower ends of pyproject.toml. Environments and logs are in .venv-matrix/.
# Needs Python 3.11, 3.12 and 3.13, on PATH or by pyenv; a row without its Python is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
[[ ${1:-} == --help || ${1:-} == -h ]] && { usage; exit; }

rows=()
while (($#)); do
  [[ $1 == -- ]] && { shift; break; }
  rows+=("$1")
  shift
done
((${#rows[@]})) || rows=(3.11 3.12 3.13 newest colab lowest)

# The lower ends: "flax>=0.11.2" becomes "flax==0.11.2".
lowest() {
  "$1" - << 'EOF'
import re, tomllib
for line in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']:
  print(re.sub(r'>=([^,]+).*', r'==\1', line))
EOF
}

build() {  # build ROW PYTHON FOLDER
  local pip=("$3/bin/python" -m pip install --quiet --disable-pip-version-check)
  rm -rf "$3" && "$2" -m venv "$3" || return  # set -e does not hold in a condition
  case $1 in
    newest) "${pip[@]}" --editable '.[test]' ;;
    colab) "${pip[@]}" --no-deps -r tests/colab/cpu.txt && "${pip[@]}" --editable '.[test]' 'jax==0.7.2' 'flax==0.11.2' ;;
    lowest) lowest "$2" > "$3/lowest.txt" && "${pip[@]}" --constraint "$3/lowest.txt" --editable '.[test]' ;;
    3.*) "${pip[@]}" --constraint constraints.txt --editable '.[test]' ;;
    *) echo "error: unknown row $1: see bash launch/matrix.sh --help" >&2; return 2 ;;
  esac
}

table=$'| row | Python | jax | flax | NumPy | PyAV | tests |\n|---|---|---|---|---|---|---|'
failed=0
for row in "${rows[@]}"; do
  case $row in 3.*) version=$row ;; lowest) version=3.11 ;; *) version=3.13 ;; esac
  folder=.venv-matrix/$row
  python=$(python_of "$version") || { echo "$row: no Python $version, skipped"; continue; }
  mkdir -p .venv-matrix
  echo "$row: installing into $folder"
  if build "$row" "$python" "$folder" > "$folder.log" 2>&1; then
    "$folder/bin/python" -m pytest -n auto --maxprocesses=4 --dist loadfile "$@" >> "$folder.log" 2>&1 || failed=1
    result=$(grep -E '^[0-9]+ (passed|failed)|^(FAILED|ERROR)|no tests ran' "$folder.log" | tail -n 1 || true)
  else
    failed=1
    result="cannot be installed: $(grep -iE '^error' "$folder.log" | tail -n 1 || true)"
  fi
  versions=$("$folder/bin/python" -c 'import platform
from importlib.metadata import version
print(platform.python_version(), *map(version, ("jax", "flax", "numpy", "av")), sep=" | ")' 2> /dev/null || true)
  table+=$'\n'"| $row | $versions | ${result:-see $folder.log} |"
done
echo "$table"
exit "$failed"
