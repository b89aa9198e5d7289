"""Virtual environments with other versions of packages."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLAB = Path(__file__).parents[1] / 'colab'


def build_wheel(folder: Path) -> Path:
  """Builds the package's wheel into a folder, and returns its path."""
  _run('python3', '-m', 'pip', 'wheel', '--quiet', '--no-deps', f'--wheel-dir={folder}', ROOT)
  (wheel,) = folder.glob('mevit_jax-*.whl')
  return wheel


def find_python(version: str) -> str | None:
  """Returns the interpreter of a version such as 3.13, on PATH or installed by pyenv, or None."""
  script = f'source launch/environment.sh; python_of {version}'
  return subprocess.run(['bash', '-c', script], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


def build_environment(folder: Path, python: str, requirements: Path) -> Path:
  """Creates an environment with exactly the packages of a requirements file; returns its Python."""
  _run(python, '-m', 'venv', folder)
  _run(folder / 'bin/python', '-m', 'pip', 'install', '--quiet', '--no-deps', '-r', requirements)
  return folder / 'bin/python'


def versions(python: Path) -> dict[str, str]:
  """Returns the versions of an environment's packages by name, as pip spells it."""
  listed = subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], capture_output=True, text=True, check=True)
  return dict(line.split('==') for line in listed.stdout.lower().replace('_', '-').splitlines())


def _run(*command: str | Path) -> None:
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
