# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with the pinned requirements and this package (editable).
#   environment FOLDER REQUIREMENTS...      PYTHON=python3.12 bash launch/demo.sh uses another Python

environment() {
  local folder=$1
  shift
  local installed="$folder/installed.txt"
  if ! cat "$@" pyproject.toml | cmp -s - "$installed"; then
    echo "installing into $folder (once)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
      { echo "error: Python 3.11, 3.12 or 3.13 is needed: PYTHON=/path/to/python bash $0" >&2; return 1; }
    "${PYTHON:-python3}" -m venv "$folder"
    local arguments=()
    local file
    for file in "$@"; do arguments+=(-r "$file"); done
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    cat "$@" pyproject.toml > "$installed"
  fi
}

usage() {  # prints the comment at the top of the calling script
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[1]}"
}

run() {  # runs a command; with dry_run=1 only prints it
  if [[ ${dry_run:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
