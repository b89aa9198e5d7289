"""The notebook: no outputs are committed, the first cell installs the package, a kernel executes it (with --slow)."""

import ast
import base64
import io
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.environments import COLAB, build_environment, build_wheel, find_python, versions

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'notebooks/evaluate.ipynb'
CELLS = json.loads(NOTEBOOK.read_text())['cells']
CODE = [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code']

CHANCE, MARGIN = 1 / 8, 0.3  # chance of eight classes; required margin of the notebook's short training


def test_notebook_is_valid():
  nbformat = pytest.importorskip('nbformat', reason='nbformat is not installed (extra test)')
  nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


def test_notebook_has_no_outputs():
  for cell in CELLS:
    assert not cell['metadata'], cell['id']
    if cell['cell_type'] == 'code':
      assert (cell['outputs'], cell['execution_count']) == ([], None), cell['id']
  strings = [node.value for source in CODE for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
  assert not [value for value in strings if str(value).startswith(('/', '~'))]  # absolute paths of a machine
  assert not re.search(r'/(home|root|tmp|content|Users|work)/', NOTEBOOK.read_text())


@pytest.mark.parametrize('number', range(len(CODE)))
def test_cells_compile_and_have_form_fields(number):
  source = CODE[number]
  compile(source, f'cell {number}', 'exec')
  assert source.startswith('# @title ')
  for line in source.splitlines():  # unindented literals are form fields
    if re.fullmatch(r"[a-z_]+ = (?:'[^']*'|-?[\d.]+|True|False)(?: .*)?", line):
      assert '# @param ' in line, line


@pytest.fixture
def recorded_pip(tmp_path):
  """The first cell in a Python without the package, with a pip that only records its arguments."""
  (tmp_path / 'pip').mkdir()
  (tmp_path / 'pip/__init__.py').touch()
  (tmp_path / 'pip/__main__.py').write_text('import sys\nprint(sys.argv[1:])\n')

  def run(source, folder='.'):
    cell = CODE[0].replace("source = ''", f'source = {source!r}')
    hidden = 'import importlib.util\nimportlib.util.find_spec = lambda name: None\n'
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    return subprocess.run(
      [sys.executable, '-c', hidden + cell], cwd=tmp_path / folder, env=environment, capture_output=True, text=True
    )

  return run


def test_the_package_comes_from_a_repository_a_wheel_or_the_clone(tmp_path, recorded_pip):
  (tmp_path / 'mevit.whl').touch()
  (tmp_path / 'mevit_jax').mkdir()
  (tmp_path / 'notebooks').mkdir()
  for source, folder, package in (
    ('https://example.com/a/b', '.', 'git+https://example.com/a/b'),
    ('git+https://example.com/a/b@v0.1.0', '.', 'git+https://example.com/a/b@v0.1.0'),
    ('mevit.whl', '.', 'mevit.whl'),
    ('', 'notebooks', '..'),
  ):
    run = recorded_pip(source, folder)
    assert run.returncode == 0, run.stderr
    arguments = ast.literal_eval(run.stdout)
    assert arguments[:3] == ['install', '--quiet', package]
    assert f'jax=={jax.__version__}' in arguments  # the runtime's jax stays
  run = recorded_pip('')
  assert run.returncode
  assert 'source is empty: give the URL of a git repository' in run.stderr


@pytest.mark.parametrize('runtime', ['cpu', 'gpu', 'tpu'])
def test_dependencies_accept_colabs_packages(runtime):
  requirements = pytest.importorskip('packaging.requirements')
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  pins = dict(
    line.lower().replace('_', '-').split('==') for line in (COLAB / f'{runtime}.txt').read_text().splitlines()
    if not line.startswith('#')
  )  # fmt: skip
  dependencies = [requirements.Requirement(line) for line in project['dependencies']]
  refused = {
    dependency.name: str(dependency.specifier)
    for dependency in dependencies
    if dependency.name in pins and not dependency.specifier.contains(pins[dependency.name])
  }
  assert {'jax', 'flax', 'numpy', 'protobuf', 'orbax-checkpoint'} <= pins.keys()
  assert refused.keys() == {'tensorflow-metadata'}  # which fails with Colab's protobuf, and is replaced


# TensorFlow as Colab has it, except that importing it leaves a trace and fails.
TENSORFLOW = """
from pathlib import Path
Path(__file__).with_name('imported').touch()
raise RuntimeError('TensorFlow was imported')
"""


@pytest.fixture(scope='module')
def colab(tmp_path_factory):
  """The Python of an environment with the packages of Colab's CPU runtime, and a TensorFlow that fails."""
  python = find_python('3.13') or pytest.skip('needs Python 3.13, which Colab has')
  folder = tmp_path_factory.mktemp('colab')
  python = build_environment(folder, python, COLAB / 'cpu.txt')
  (packages,) = folder.glob('lib/*/site-packages')
  (packages / 'tensorflow').mkdir()
  (packages / 'tensorflow/__init__.py').write_text(TENSORFLOW)
  return python


@pytest.fixture(scope='module')
def executed(request, tmp_path_factory):
  """The notebook, executed by a new kernel in an empty folder, with its CPU seconds and the kernel's environment.

  It runs with the packages of Colab's runtime, where the first cell installs the wheel; without Python 3.13, in the
  environment of the tests, which has the package.
  """
  nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed (extra slow)')
  pytest.importorskip('ipykernel', reason='ipykernel is not installed (extra slow)')
  import nbformat

  folder = tmp_path_factory.mktemp('executed')
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  python, before = Path(sys.executable), {}
  if colab_python := find_python('3.13'):
    python = request.getfixturevalue('colab')
    before = versions(python)
    wheel = build_wheel(folder)
    (install,) = (cell for cell in notebook.cells if cell.source.startswith('# @title Install'))
    install.source = install.source.replace("source = ''", f'source = {wheel.name!r}')
  kernel = folder / 'jupyter/kernels/tested/kernel.json'
  kernel.parent.mkdir(parents=True)
  command = [str(python), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
  kernel.write_text(json.dumps({'argv': command, 'display_name': 'tested', 'language': 'python'}))
  start = _child_cpu_seconds()
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('XLA_FLAGS')  # the eight devices of tests/conftest.py
    patch.setenv('IPYTHONDIR', str(folder / 'ipython'))
    patch.setenv('JUPYTER_PATH', str(folder / 'jupyter'))
    patch.setenv('PYTHONPATH', '' if colab_python else str(ROOT))
    nbclient.NotebookClient(
      notebook, timeout=None, kernel_name='tested', resources={'metadata': {'path': str(folder)}}
    ).execute()
  nbformat.write(notebook, folder / 'executed.ipynb')
  return Executed(folder, notebook, _child_cpu_seconds() - start, python, before)


class Executed(NamedTuple):
  folder: Path
  notebook: Any
  seconds: float  # CPU time
  python: Path  # of the kernel
  before: dict[str, str]  # versions of its packages before the notebook


def _child_cpu_seconds():
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def outputs_of(notebook, title, kind):
  """Returns the outputs of a cell with one MIME type."""
  (cell,) = (cell for cell in notebook.cells if cell.source.startswith(f'# @title {title}\n'))
  return [output['data'][kind] for output in cell.outputs if kind in output.get('data', {})]


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # warnings about the client's sockets
def test_execution(executed):
  folder, notebook, seconds, _, _ = executed
  assert not [output for cell in notebook.cells for output in cell.get('outputs', []) if output.output_type == 'error']
  (results,) = (folder / 'runs/notebook').glob('demo-*/evaluation/validation-2x1/results.json')
  top1 = json.loads(results.read_text())['top1']
  print(f'top-1 {top1:.1%}, {seconds:.0f} s of CPU')
  assert top1 > CHANCE + MARGIN


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_pictures_and_videos(executed):
  notebook = executed.notebook
  for title in ('The report', 'Explain'):
    (picture,) = outputs_of(notebook, title, 'image/png')
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
      assert len(np.unique(np.asarray(image))) > 20
  (page,) = (page for page in outputs_of(notebook, 'The report', 'text/html') if '<iframe' in page)
  assert page.count('data:image/') > 10
  for title in ('Predict', 'Explain'):
    (video,) = outputs_of(notebook, title, 'text/html')
    assert 'data:video/mp4;base64' in video
  cells = {cell.source.splitlines()[0].removeprefix('# @title '): cell for cell in notebook.cells if cell.source}
  text = ''.join(output.get('text', '') for output in cells['A folder'].outputs)
  assert text.count('.mp4: ') == 9
  assert 'broken.mp4: not a video' in text


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_a_runtimes_packages_stay(executed):
  """Installing the package adds packages, and replaces none that a running kernel could have imported."""
  if executed.before:
    after = versions(executed.python)
    changed = {name for name, version in executed.before.items() if after.get(name) != version}
    assert changed <= {'absl-py', 'tensorflow-metadata', 'toolz'}
    assert not list(executed.python.parents[1].glob('lib/*/site-packages/tensorflow/imported'))
