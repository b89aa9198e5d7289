"""Models by name in whole commands: the commit is recorded, and no dataset is needed."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from mevit_jax import experiment as runs
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import write_workdir
from mevit_jax.cli import convert as convert_command
from mevit_jax.cli import explain as explain_command
from mevit_jax.cli import push as push_command
from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import Config
from mevit_jax.convert import convert, convert_alone
from mevit_jax.errors import UserError
from mevit_jax.inference.export import export_checkpoint
from mevit_jax.inference.predictor import Predictor
from mevit_jax.models.functional import build_model
from mevit_jax.pretrained.export import export
from mevit_jax.pretrained.models import open_model
from mevit_jax.workdirs import check_workdir
from tests.helpers import hub as hubs
from tests.helpers.videos import make_video

ROOT = Path(__file__).parents[2]
NAMES = ('moves left', 'moves right', 'stands')


@pytest.fixture
def hub(tmp_path, monkeypatch):
  with hubs.serve() as hub:
    hubs.use(hub, tmp_path / 'cache', monkeypatch)
    yield hub


@pytest.fixture
def vit(tiny):
  """The config of an image classifier that fits the config of the tests."""
  return dataclasses.replace(tiny().model, classes=3, frames=1, space_blocks=2, motion_blocks=0)


@pytest.fixture
def name(hub, vit, tmp_path):
  """The name of that classifier on the hub, with its commit."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), build_model(vit).abstract)
  export(tmp_path / 'vit', params, vit, 'hf_vit', class_names=NAMES, normalization=Normalization())
  commit = hub.add('org/vit', {path.name: path.read_bytes() for path in (tmp_path / 'vit').iterdir()})
  return f'hf://org/vit@{commit}'


def test_a_run_records_the_commit_that_it_started_from(tiny, hub, name, tmp_path):
  """A resumed run uses the recorded commit, also after the branch has moved."""
  config = dataclasses.replace(tiny(), init_from='hf://org/vit')
  run = runs.prepare_run(config, tmp_path / 'run')
  assert run.config.init_from == run.metadata['config']['init_from'] == name
  write_workdir(tmp_path / 'run', run.metadata)
  hub.add('org/vit', {'config.json': b'another model'})
  for init_from in ('hf://org/vit', name, ''):  # as given, as recorded, or not given
    again = runs.prepare_run(dataclasses.replace(config, init_from=init_from), tmp_path / 'run')
    check_workdir(again)
    assert again.config.init_from == name
  other = runs.prepare_run(dataclasses.replace(config, init_from='hf://org/other'), tmp_path / 'run')
  with pytest.raises(UserError, match=r'init_from: hf://org/vit@\w+ -> hf://org/other'):
    check_workdir(other)


def test_init_weights_is_part_of_a_run(tiny, name, tmp_path):
  with pytest.raises(UserError, match='only raw parameters, no EMA ones'):
    runs.prepare_run(dataclasses.replace(tiny(), init_from='hf://org/vit', init_weights='ema'), tmp_path / 'run')
  with pytest.raises(UserError, match='init_weights must be one of'):
    Config(init_weights='mean')


def test_convert_needs_no_dataset(tiny, name, tmp_path, monkeypatch, capsys):
  """Without a config the result is the source's own model; with one, a model with its stages. Both keep the classes."""
  values = {'config': None, 'workdir': str(tmp_path / 'own')}
  monkeypatch.setattr(convert_command.flags, 'FLAGS', types.SimpleNamespace(**values))
  convert_command.main(['convert', 'hf://org/vit'])
  assert f'mevit predict VIDEO --model={tmp_path / "own"}' in capsys.readouterr().out
  own = load_checkpoint(tmp_path / 'own')
  assert (own.class_names, own.config.init_from, own.config.model.frames) == (NAMES, name, 1)
  config = tiny(**{'data.data_dir': str(tmp_path / 'nowhere')})
  convert(dataclasses.replace(config, init_from='hf://org/vit'), str(tmp_path / 'staged'))
  staged = load_checkpoint(tmp_path / 'staged')
  assert staged.config.model == dataclasses.replace(config.model, classes=3, layer_norm_eps=1e-6)
  for checkpoint in (own, staged):
    assert np.any(checkpoint.params['head']['kernel'])
  with pytest.raises(UserError, match='nowhere'):  # a new head needs the classes of a dataset
    convert(dataclasses.replace(config, init_from='hf://org/vit', init_head='fresh'), str(tmp_path / 'fresh'))
  with pytest.raises(UserError, match='is not empty'):
    convert_alone('hf://org/vit', str(tmp_path / 'own'))


def test_predict_and_export_take_names(name, tmp_path):
  """The exported models have the same parameters."""
  predictor = Predictor('hf://org/vit')
  assert predictor.predict(make_video(20)).names == predictor.class_names == NAMES
  expected = open_model(name).params
  export_checkpoint('hf://org/vit', 'mevit', tmp_path / 'shared')
  jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / 'shared').params, expected)
  export_checkpoint(name, 'hf_vit', tmp_path / 'again')
  jax.tree.map(np.testing.assert_array_equal, open_model(tmp_path / 'again').params, expected)


@pytest.mark.slow
def test_explain_takes_names(name, tmp_path, monkeypatch):
  (tmp_path / 'clip.mp4').write_bytes(make_video(20))
  options = {'model': 'hf://org/vit', 'checkpoint': 'last', 'block': -1, 'query': '', 'overlay': None}
  values = types.SimpleNamespace(**options, figure=str(tmp_path / 'attention.png'))
  monkeypatch.setattr(explain_command.flags, 'FLAGS', values)
  explain_command.main(['explain', str(tmp_path / 'clip.mp4')])
  assert (tmp_path / 'attention.png').stat().st_size


def test_push_takes_shared_models(hub, name, tmp_path, monkeypatch):
  monkeypatch.setattr(push_command.flags, 'FLAGS', types.SimpleNamespace(private=True))
  with pytest.raises(UserError, match='is not a shared model'):
    push_command.main(['push', str(tmp_path / 'vit'), 'hf://me/vit'])
  for arguments in ([], ['shared'], ['shared', 'me/vit']):
    with pytest.raises(UserError, match='give the folder of a shared model, and its name'):
      push_command.main(['push', *arguments])
  convert_alone('hf://org/vit', str(tmp_path / 'shared'))
  (tmp_path / 'shared' / 'model.safetensors').write_bytes(b'damaged')
  with pytest.raises(UserError, match='is damaged'):
    push_command.main(['push', str(tmp_path / 'shared'), 'hf://me/vit'])
  assert 'me/vit' not in hub.commits


@pytest.mark.slow
def test_predict_by_name_from_an_empty_folder(hub, name, tmp_path):
  """One command, with the environment variables of huggingface_hub; standard output has only the predictions."""
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'clip.mp4').write_bytes(make_video(20))
  environment = {
    'PYTHONPATH': str(ROOT),
    'HF_ENDPOINT': hub.url,
    'HF_HOME': str(tmp_path / 'home'),
    'HF_HUB_DISABLE_XET': '1',
  }

  def predict(model, **changes):
    command = [sys.executable, '-m', 'mevit_jax', 'predict', str(tmp_path / 'clip.mp4'), f'--model={model}', '--json']
    return subprocess.run(
      command, cwd=tmp_path / 'empty', env={**os.environ, **environment, **changes}, capture_output=True, text=True
    )

  done = predict('hf://org/vit')
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  assert {entry['label'] for entry in json.loads(line)['predictions'][0]['top']} == set(NAMES)
  assert name in done.stderr
  offline = predict('hf://org/vit', HF_HUB_OFFLINE='1', HF_ENDPOINT='http://127.0.0.1:9')
  assert offline.stdout == done.stdout
  missing = predict('hf://org/nothing')
  assert (missing.returncode, len(missing.stderr.splitlines())) == (1, 1)
