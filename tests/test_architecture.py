"""Architecture: imports go downward only, signatures are short, and nothing needs TensorFlow."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'mevit_jax').rglob('*.py'))
OURS = [
  *FILES,
  *ROOT.glob('*.py'),
  *(file for folder in ('configs', 'benchmarks', 'tests') for file in (ROOT / folder).rglob('*.py')),
]

# The rank of every folder and top-level module of the package. Imports go from a higher rank to a lower one, or stay
# within their own folder. The modules of rank 6 count as one folder.
RANKS = {
  'cli': 7,
  'train': 6, 'evaluate': 6, 'experiment': 6, 'plan': 6, 'convert': 6, 'predict': 6,
  'batches': 6, 'workdirs': 6,
  'inference': 5, 'report': 5,
  'evaluation': 4, 'pretrained': 4,
  'training': 3, 'checkpoint': 3,
  'models': 2, 'datasets': 2, 'data': 2, 'augment': 2, 'parallel': 2, 'planning': 2,
  'video': 1,
  'config': 0, 'errors': 0, 'files': 0, 'progress': 0, 'trees': 0,
}  # fmt: skip
SIDEWAYS = {('data', 'datasets'), ('config', 'errors'), ('files', 'errors'), ('progress', 'errors')}
ENTRY = {'', '__main__'}  # the package's lazy exports, and `python -m mevit_jax`


def may_import(importer, imported):
  """Returns whether a folder may import from another one."""
  if importer == imported or imported == '' or (importer, imported) in SIDEWAYS:
    return True
  if importer == '__main__':
    return imported == 'cli'
  if importer in ENTRY:
    return False
  same_loop = RANKS[importer] == RANKS[imported] == 6
  return same_loop or RANKS[importer] > RANKS[imported]


def module_of(file):
  """Returns the module name of a file: mevit_jax/video/decode.py -> mevit_jax.video.decode."""
  parts = file.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(file):
  """Returns the full names of a file's imports, at its top or within a function."""
  module = module_of(file)
  return imports_of(module if file.name != '__init__.py' else f'{module}.__init__', file.read_text())


def imports_of(module, source):
  """Returns the full names of the imports of a module with this source."""
  package = module.split('.')[:-1]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      start = package[: len(package) + 1 - node.level] if node.level else []
      base = '.'.join([*start, *([node.module] if node.module else [])])
      yield from (f'{base}.{alias.name}' for alias in node.names)


def part_of(name):
  """Returns a module's folder: mevit_jax.video.decode -> video."""
  part = name.split('.')[1] if '.' in name else ''
  return '' if part.startswith('__') and part != '__main__' else part


def library_of(name):
  return name.split('.')[0]


def wrong_imports(module, source):
  """Returns the folders that a module imports from, although it must not."""
  used = {part_of(name) for name in imports_of(module, source) if library_of(name) == 'mevit_jax'}
  return {part for part in used if not may_import(part_of(module), part)}


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_downward_only(module):
  assert part_of(module) in RANKS.keys() | ENTRY, f'{module} has no rank: add its folder to RANKS'
  assert not wrong_imports(module, MODULES[module].read_text())


@pytest.mark.parametrize('one', RANKS)
def test_upward_and_sideways_imports_fail(one):
  """Upward and sideways imports between any two folders fail, in each form of the statement."""
  for other in RANKS.keys() - {one}:
    down = RANKS[one] > RANKS[other] or (one, other) in SIDEWAYS or RANKS[one] == RANKS[other] == 6
    for planted in (
      f'import mevit_jax.{other}.x',
      f'from mevit_jax import {other}',
      f'from mevit_jax.{other}.x import y',
      f'def f():\n  from ..{other} import y',
    ):
      assert wrong_imports(f'mevit_jax.{one}.planted', planted) == (set() if down else {other}), planted


def parameters_of(function):
  """Returns the names of a function's parameters except self and cls."""
  arguments = function.args
  names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
  return [name for name in names if name not in ('self', 'cls')]


def test_signatures_are_short():
  for file in FILES:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        names = parameters_of(node)
        assert len(names) <= 7, f'{file}:{node.lineno} has {len(names)} parameters: pass a config'


def test_imports_have_no_cycles():
  def imported(file):
    for name in imports(file):
      yield name if name in MODULES else name.rpartition('.')[0]

  graph = {module: set(imported(file)) & set(MODULES) - {module} for module, file in MODULES.items()}
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
  ('library', 'home'),
  [
    ('flax', {'models'}),
    ('ml_collections', {'config'}),
    ('jax', set(RANKS) - {'data', 'datasets', 'video', 'config', 'files', 'progress', 'errors'}),
  ],
)
def test_libraries_are_imported_only_in_their_folders(library, home):
  users = [module for module in MODULES if library in map(library_of, imports(MODULES[module]))]
  assert {part_of(module) for module in users} <= home, users


def test_models_import_only_jax_and_flax():
  models = [file for module, file in MODULES.items() if part_of(module) == 'models']
  used = {library_of(name) for file in models for name in imports(file)}
  assert used - sys.stdlib_module_names <= {'mevit_jax', 'jax', 'flax', 'numpy'}


def test_nothing_imports_tensorflow():
  users = [file for file in OURS if 'tensorflow' in map(library_of, imports(file))]
  assert not users


# Refuses to import a library (TFDS looks for it in sys.modules, so None is not enough there), then imports
# modules. Commands define flags of the same names, so they are deleted in between.
IMPORT = """
import importlib, sys
library, *modules = sys.argv[1:]
class Refuse:
  def find_spec(self, name, *_):
    if name.partition('.')[0] == library:
      raise ModuleNotFoundError(f'No module named {name!r}: refused by this test', name=name)
sys.meta_path.insert(0, Refuse())
from absl import flags
for module in modules:
  importlib.import_module(module)
  for flag in list(flags.FLAGS):
    delattr(flags.FLAGS, flag)
assert library not in sys.modules
"""


@pytest.mark.parametrize(
  ('library', 'modules'),
  [
    ('tensorflow', list(MODULES)),
    ('jax', [module for module in MODULES if part_of(module) in ('data', 'datasets', 'video', 'config')]),
  ],
  ids=['without tensorflow', 'data without jax'],
)
def test_modules_import_without(library, modules):
  command = [sys.executable, '-c', IMPORT, library, *modules]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
