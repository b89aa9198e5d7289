# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with the pinned requirements, made once.
#   environment FOLDER REQUIREMENTS...      PYTHON=python3.12 bash launch/demo.sh takes another Python

environment() {
  local folder=$1
  shift
  local mark="$folder/installed.txt"
  if ! cat "$@" | cmp -s - "$mark"; then
    echo "installing into $folder (once)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
      { echo "error: Python 3.11 or 3.12 is needed: PYTHON=/path/to/python bash $0" >&2; return 1; }
    "${PYTHON:-python3}" -m venv "$folder"
    local arguments=()
    local file
    for file in "$@"; do arguments+=(-r "$file"); done
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    cat "$@" > "$mark"
  fi
}

usage() {  # the comment at the top of the script that calls it
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[1]}"
}

run() {  # a command; with dry_run=1 it is only printed
  if [[ ${dry_run:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
