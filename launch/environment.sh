# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with this package (editable) and the versions of constraints.txt.
#   environment FOLDER [EXTRA,...]      PYTHON=python3.12 bash launch/demo.sh uses another Python

environment() {
  local folder=$1 extras=${2:-}
  local installed="$folder/installed.txt"
  if ! cat pyproject.toml constraints.txt - <<< "$extras" | cmp -s - "$installed"; then
    echo "installing into $folder (once)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
      { echo "error: Python 3.11, 3.12 or 3.13 is needed: PYTHON=/path/to/python bash $0" >&2; return 1; }
    "${PYTHON:-python3}" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
      --editable ".${extras:+[$extras]}"
    cat pyproject.toml constraints.txt - <<< "$extras" > "$installed"
  fi
}

python_of() {  # prints the interpreter of a version such as 3.13: on PATH, or installed by pyenv
  local python
  for python in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
    "$python" -c '' 2> /dev/null && { echo "$python"; return; }
  done
  return 1
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
