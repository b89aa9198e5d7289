"""The notebook: no outputs are committed, installed packages are kept, and (slow) a kernel executes it."""

import ast
import base64
import importlib.util
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'notebooks/evaluate.ipynb'
CELLS = json.loads(NOTEBOOK.read_text())['cells']
CODE = [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code']

CHANCE, MARGIN = 1 / 8, 0.3  # chance of eight classes; required margin of the notebook's short training


def test_notebook_is_valid():
  nbformat = pytest.importorskip('nbformat', reason='nbformat is not installed (requirements-test.txt)')
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


@pytest.mark.parametrize('kind', ['git', 'zip'])
def test_the_code_comes_from_a_repository_or_a_zip(tmp_path, kind):
  code = tmp_path / 'code of another name'
  for file in ('mevit_jax/__init__.py', 'launch/colab.py'):
    (code / file).parent.mkdir(parents=True)
    shutil.copy(ROOT / file, code / file)
  (code / 'requirements.txt').write_text('pytest==9\n\nnothing==1\n')  # already installed
  (tmp_path / 'runtime').mkdir()
  if kind == 'zip':
    source = Path(shutil.make_archive(str(tmp_path / 'runtime/code'), 'zip', tmp_path, code.name)).name
  else:
    source = str(code)
    author = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
    for command in (['init', '--quiet'], ['add', '.'], [*author, 'commit', '--quiet', '-m', 'all']):
      subprocess.run(['git', *command], cwd=code, check=True)
  cell = CODE[0].replace("source = ''", f'source = {source!r}') + '\nimport mevit_jax\nprint(mevit_jax.__file__)'
  for _ in range(2):  # a kernel may be restarted
    run = subprocess.run([sys.executable, '-c', cell], cwd=tmp_path / 'runtime', capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / 'runtime/code')
  cell = CODE[0].replace("source = ''", "source = 'nothing.zip'")
  run = subprocess.run([sys.executable, '-c', cell], cwd=tmp_path, capture_output=True, text=True)
  assert run.returncode
  assert "'nothing.zip' does not exist" in run.stderr


def colab():
  spec = importlib.util.spec_from_file_location('colab', ROOT / 'launch/colab.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_installed_packages_of_a_runtime_are_kept():
  """pip installs only missing packages, and does not replace the runtime's jax."""
  missing, oldest = colab().missing_requirements, colab().OLDEST
  text = '# for CPU\nabsl-py==2.5.1\njax==0.10.2\nml_collections==1.1.0\n\n# Dependencies of these.\njaxlib==0.10.2\n'
  there = {'absl_py': '1.4.0', 'jax': '0.9.0', 'jax-cuda12-plugin': '0.9.0'}
  at_least = [f'{name}>={version}' for name, version in oldest.items()]
  assert missing(text, there) == ['ml_collections<=1.1.0', *at_least]
  assert missing(text, {**there, 'ML.Collections': '1.0'}) == []
  # The pins of requirements.txt are not older than these versions.
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  pins = dict(line.split('==') for line in lines if '==' in line and not line.startswith('#'))
  for name, version in oldest.items():
    assert [*map(int, pins[name].split('.'))] >= [*map(int, version.split('.'))]


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """Notebook executed by a new kernel in a copy of the repository, and its CPU seconds."""
  nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed (requirements-parity.txt)')
  pytest.importorskip('ipykernel', reason='ipykernel is not installed (requirements-parity.txt)')
  import nbformat

  folder = tmp_path_factory.mktemp('checkout')
  for name in ('mevit_jax', 'configs', 'launch', 'notebooks'):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'requirements.txt', folder)
  notebook = nbformat.read(folder / 'notebooks/evaluate.ipynb', as_version=4)
  before = _child_cpu_seconds()
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('XLA_FLAGS')  # the eight devices of tests/conftest.py
    patch.setenv('IPYTHONDIR', str(folder / 'ipython'))
    nbclient.NotebookClient(
      notebook, timeout=None, kernel_name='python3', resources={'metadata': {'path': str(folder / 'notebooks')}}
    ).execute()
  return folder, notebook, _child_cpu_seconds() - before


def _child_cpu_seconds():
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def outputs_of(notebook, title, kind):
  """Returns the outputs of a cell with one MIME type."""
  (cell,) = (cell for cell in notebook.cells if cell.source.startswith(f'# @title {title}\n'))
  return [output['data'][kind] for output in cell.outputs if kind in output.get('data', {})]


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # warnings about the client's sockets
def test_notebook_runs_within_its_time_and_reaches_its_accuracy(executed):
  folder, notebook, seconds = executed
  assert not [output for cell in notebook.cells for output in cell.get('outputs', []) if output.output_type == 'error']
  (results,) = (folder / 'runs/notebook').glob('demo-*/evaluation/validation-2x1/results.json')
  top1 = json.loads(results.read_text())['top1']
  print(f'top-1 {top1:.1%}, {seconds:.0f} s of CPU')
  assert top1 > CHANCE + MARGIN
  # CPU seconds bound the wall time on two idle cores.
  assert seconds < 5 * 60


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_outputs_contain_pictures_and_videos(executed):
  _, notebook, _ = executed
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
