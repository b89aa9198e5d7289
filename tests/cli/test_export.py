"""The export command: exported models equal evaluation and prediction."""

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.export import deserialize
from safetensors.numpy import load_file

from mevit_jax import Predictor, evaluate, train
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.cli import export as command
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.evaluation.protocol import averaged
from mevit_jax.evaluation.results import read_results
from mevit_jax.inference.export import export_checkpoint
from mevit_jax.models.functional import build_model, parameter_shapes
from mevit_jax.pretrained.load import load
from mevit_jax.pretrained.source import open_source
from mevit_jax.video.reader import FileReader, read_views, spans
from tests.helpers.workdirs import VIEWS, random_run

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def config(tiny, compile_once):
  return tiny(**VIEWS)


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  """Workdir of random params that was evaluated."""
  folder = random_run(config, tmp_path_factory.mktemp('runs') / 'run')
  evaluate.evaluate(config, str(folder))
  return folder


@pytest.fixture(scope='module')
def shared(workdir):
  return export_checkpoint(workdir, 'mevit', workdir.parent / 'shared').path.parent


def run_alone(code, folder):
  """Runs code in an environment with JAX and NumPy only, without this package and its other requirements."""
  absent = ('mevit_jax', 'flax', 'orbax', 'optax', 'grain', 'safetensors', 'av', 'PIL')
  refuse = f'import sys; sys.modules.update(dict.fromkeys({absent}))\n'
  done = subprocess.run([sys.executable, '-c', refuse + code], cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_exported_model_predictor_and_evaluation_agree(config, workdir, shapes_dir, tmp_path, monkeypatch, capsys):
  """For the same videos; the code that runs the exported model is that of docs/export.md, without this package."""
  options = {'to': 'stablehlo', 'folder': str(tmp_path / 'exported'), 'checkpoint': 'last', 'weights': 'auto'}
  monkeypatch.setattr(command.flags, 'FLAGS', types.SimpleNamespace(model=str(workdir), **options))
  command.main(['export'])
  output = capsys.readouterr().out
  assert re.match(
    r'exported step 0 \(ema parameters\) of .*, 0\.\d+ MB, in .* s\nstartup on cpu: read in .* s, first call', output
  )
  code = re.search(r'```python\n(.*?)```', (ROOT / 'docs/export.md').read_text(), re.DOTALL)[1]
  code += "np.save('probabilities.npy', model.call(views))"
  _, evaluated, names = read_results(workdir / 'evaluation/validation-2x2')
  assert tuple(json.loads((tmp_path / 'exported/model.json').read_text())['class_names']) == names
  split, predictor = datasets.open_split(shapes_dir, 'moving_shapes', 'validation'), Predictor(workdir)
  examples = {example['id']: example['video'] for example in (split.source[i] for i in range(3))}
  views = np.concatenate([
    next(read_views(reader, config.clip, spans(reader), 2, 2))[1] for reader in map(FileReader, examples.values())
  ])  # fmt: skip
  np.save(tmp_path / 'frames.npy', views[:4])
  lines = run_alone(code, tmp_path).splitlines()
  first, alone = predictor.predict(next(iter(examples.values()))), np.load(tmp_path / 'probabilities.npy')
  assert [line.split()[-1] for line in lines] == [label for label, _ in first.top(5)]
  exported = deserialize(bytearray((tmp_path / 'exported/model.jax_export').read_bytes()))
  found = np.asarray(exported.call(views)).reshape(3, 4, -1)  # video view class
  np.testing.assert_allclose(found[0], alone, atol=1e-6, rtol=0)
  rows = [evaluated.ids.tolist().index(video) for video in examples]
  predicted = np.stack([predictor.predict(data).probabilities for data in examples.values()])
  for other in (predicted, evaluated.probabilities[rows]):
    np.testing.assert_allclose(found.mean(axis=1), other, atol=1e-5, rtol=0)
  assert np.ptp(predicted, axis=0).max() > 0.01
  geometric = np.exp(np.log(found).mean(axis=1))  # as in the docs for an average of logits
  geometric /= geometric.sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(geometric, averaged(evaluated.logits[rows], 'logits'), atol=1e-5, rtol=0)


def test_a_shared_model_is_accepted_as_a_checkpoint(config, workdir, shared, shapes_dir, tmp_path):
  """By every command that accepts a checkpoint, with the same bits."""
  params, saved = load_checkpoint(workdir, weights='ema').params, load_checkpoint(shared)
  tensors = load_file(shared / 'model.safetensors')
  assert {name: x.shape for name, x in tensors.items()} == parameter_shapes(params)
  loaded = load(shared, build_model(saved.config.model), class_names=saved.class_names)
  assert {row.status for row in loaded.table} == {'loaded'}
  export_checkpoint(shared, 'mevit', tmp_path / 'again')
  for other in (saved.params, loaded.params, load_checkpoint(tmp_path / 'again').params):
    jax.tree.map(np.testing.assert_array_equal, other, params)
  results = evaluate.evaluate(config, str(shutil.copytree(shared, tmp_path / 'copy')))
  before = json.loads((workdir / 'evaluation/validation-2x2/results.json').read_text())
  assert json.loads(json.dumps(results)) == before
  split = datasets.open_split(shapes_dir, 'moving_shapes', 'validation')
  predictions = [Predictor(folder).predict(split.source[0]['video']) for folder in (workdir, shared)]
  np.testing.assert_array_equal(predictions[0].logits, predictions[1].logits)
  assert (Predictor(shared).step, Predictor(shared).weights) == (0, 'ema')


def test_model_card(workdir, shared):
  card = (shared / 'README.md').read_text()
  metadata = yaml.safe_load(card.split('---\n')[1])
  results = json.loads((workdir / 'evaluation/validation-2x2/results.json').read_text())
  assert (metadata['pipeline_tag'], metadata['datasets']) == ('video-classification', ['moving_shapes'])
  assert 'license' not in metadata
  (one,) = metadata['model-index'][0]['results']
  assert one['metrics'][0]['value'] == pytest.approx(results['top1'], abs=1e-4)
  low, high = results['top1_interval']
  row = next(line for line in card.splitlines() if line.startswith('| validation-2x2'))
  assert f'| {100 * results["top1"]:.2f} % ({100 * low:.2f} to {100 * high:.2f}) |' in row
  assert row.count('|') == 6
  assert '`moves_left`' in card
  assert str(workdir.parent) not in card + (shared / 'config.json').read_text()  # nor the path of the data


def test_model_card_without_results(workdir, tmp_path):
  """The results of the EMA parameters do not apply to the raw parameters."""
  card = (export_checkpoint(workdir, 'mevit', tmp_path / 'raw', weights='raw').path.parent / 'README.md').read_text()
  assert 'This checkpoint has not been evaluated.' in card
  assert 'model-index' not in card
  params = load_checkpoint(workdir, weights='raw').params
  jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / 'raw', weights='raw').params, params)


def test_a_shared_model_cannot_be_resumed(config, shared, tmp_path):
  folder = shutil.copytree(shared, tmp_path / 'shared')
  with pytest.raises(UserError, match=r'is an exported model, not a run'):
    train.train(config, str(folder))
  assert not (folder / 'checkpoints').exists()
  with pytest.raises(UserError, match='has only ema parameters, not raw'):
    Predictor(folder, weights='raw')
  with pytest.raises(UserError, match='has only the checkpoint of step 0, not best'):
    export_checkpoint(folder, 'mevit', tmp_path / 'new', checkpoint='best')
  weights = folder / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-1] + b'x')
  for use in (Predictor, open_source):
    with pytest.raises(UserError, match=r'is damaged, download it again: model\.safetensors has a different checksum'):
      use(folder)


def test_a_space_only_checkpoint_becomes_a_vit(tiny, tmp_path):
  config = tiny(
    **{'model.space_blocks': 2, 'model.motion_blocks': 0, 'model.frames': 1, 'training.ema': 0.9, 'mesh.data': 1}
  )
  random_run(config, tmp_path / 'run')
  path = export_checkpoint(tmp_path / 'run', 'hf_vit', tmp_path / 'out').path
  tensors = load_file(path)
  assert tensors['classifier.weight'].shape == (8, 16)
  assert {path.name for path in (tmp_path / 'out').iterdir()} >= {'config.json', 'model.safetensors'}
  with pytest.raises(UserError, match='TimeSformer'):
    export_checkpoint(tmp_path / 'run', 'hf_timesformer', tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('to', ['stablehlo', 'mevit'])
def test_invalid_arguments_are_one_line_errors(workdir, tmp_path, to):
  with pytest.raises(UserError, match=r'is no(t a)? workdir'):
    export_checkpoint(tmp_path / 'nothing', to, tmp_path / 'out')
  with pytest.raises(UserError, match='no checkpoint 7'):
    export_checkpoint(workdir, to, tmp_path / 'out', checkpoint='7')
  with pytest.raises(UserError, match='is not empty: choose another folder'):
    export_checkpoint(workdir, to, workdir)
  truncated = shutil.copytree(workdir, tmp_path / 'truncated')
  largest = max(
    (path for path in (truncated / 'checkpoints').rglob('*') if path.is_file()), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[:-9])
  with pytest.raises(UserError, match=r'all checkpoints in .* are damaged'):
    export_checkpoint(truncated, to, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
