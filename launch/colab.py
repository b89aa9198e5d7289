"""Installs the packages of requirements.txt that a Python environment with its own jax, such as Colab, lacks.

  python launch/colab.py

Installed packages are kept, except those in UPGRADED that are too old: a pinned jax would replace the runtime's build
for its device by one for CPUs, and another version of an imported package (NumPy, Matplotlib) would require a restart
of the notebook. Added packages are at most as new as in requirements.txt.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# The oldest versions that the notebook was run with.
OLDEST = {'jax': '0.8.1', 'flax': '0.12.6', 'orbax-checkpoint': '0.11.28'}
UPGRADED = {'flax', 'orbax-checkpoint'}


def missing_requirements(requirements: str, installed: dict[str, str]) -> list[str]:
  """Returns the requirements for pip; [] if all packages before the first empty line are installed.

  Args:
    requirements: text of the requirements file.
    installed: versions by package name.
  """
  lines = requirements.partition('\n\n')[0].splitlines()
  pins = dict(line.split('==') for line in lines if not line.startswith('#'))
  names = {_normalize(name) for name in installed}
  missing = [name for name in pins if _normalize(name) not in names]
  if not missing:
    return []
  at_most = [f'{name}<={pins[name]}' for name in missing]
  return [*at_most, *(f'{name}>={version}' for name, version in OLDEST.items() if name not in missing)]


def _normalize(name: str) -> str:
  """Normalizes a package name (PEP 503)."""
  return re.sub(r'[-_.]+', '-', name).lower()


def main() -> None:
  """Installs the missing packages."""
  installed = {package.name: package.version for package in importlib.metadata.distributions()}
  missing = missing_requirements((Path(__file__).parents[1] / 'requirements.txt').read_text(), installed)
  if not missing:
    return
  with tempfile.NamedTemporaryFile('w', suffix='.txt') as constraints:
    kept = {name: version for name, version in installed.items() if _normalize(name) not in UPGRADED}
    constraints.write(''.join(f'{name}=={version}\n' for name, version in kept.items()))
    constraints.flush()
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    if subprocess.run([*pip, '--constraint', constraints.name, *missing]).returncode:
      sys.exit(f'error: pip cannot add {", ".join(missing)} to this environment with jax {installed.get("jax")}')


if __name__ == '__main__':
  main()
