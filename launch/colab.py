"""Adds to a Python that has a jax of its own, Colab's say, what requirements.txt names and it lacks.

  python launch/colab.py

What is there stays, but for the libraries of UPGRADED where they are too old: a pinned jax would put one for CPUs in
the place of the runtime's, and other versions of what a notebook has imported (NumPy, Matplotlib) would ask for its
restart. What is added is at most as new as the tests' version.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# The oldest that the notebook ran with.
OLDEST = {'jax': '0.8.1', 'flax': '0.12.6', 'orbax-checkpoint': '0.11.28'}
UPGRADED = {'flax', 'orbax-checkpoint'}


def wanted(requirements: str, there: dict[str, str]) -> list[str]:
  """What pip is to install: [] if all is there that a requirements file has before its first empty line.

  Args:
    requirements: the file's text.
    there: versions by name.
  """
  lines = requirements.partition('\n\n')[0].splitlines()
  pins = dict(line.split('==') for line in lines if not line.startswith('#'))
  known = {_plain(name) for name in there}
  missing = [name for name in pins if _plain(name) not in known]
  if not missing:
    return []
  at_most = [f'{name}<={pins[name]}' for name in missing]
  return [*at_most, *(f'{name}>={version}' for name, version in OLDEST.items() if name not in missing)]


def _plain(name: str) -> str:
  """A package's name as all spell it."""
  return re.sub(r'[-_.]+', '-', name).lower()


def main() -> None:
  """Installs what is missing."""
  there = {found.name: found.version for found in importlib.metadata.distributions()}
  asked = wanted((Path(__file__).parents[1] / 'requirements.txt').read_text(), there)
  if not asked:
    return
  with tempfile.NamedTemporaryFile('w', suffix='.txt') as constraints:
    kept = {name: version for name, version in there.items() if _plain(name) not in UPGRADED}
    constraints.write(''.join(f'{name}=={version}\n' for name, version in kept.items()))
    constraints.flush()
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    if subprocess.run([*pip, '--constraint', constraints.name, *asked]).returncode:
      sys.exit(f'error: beside this jax {there.get("jax")} pip cannot add {", ".join(asked)}')


if __name__ == '__main__':
  main()
