"""Several commands in one workdir: trainings exclude each other, and evaluations of other data replace nothing."""

import contextlib
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mevit_jax import evaluate, train
from mevit_jax.convert import convert
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError
from mevit_jax.files import LOCK, lock_folder
from mevit_jax.inference.export import export_checkpoint
from tests.helpers.disk import full_disk
from tests.helpers.workdirs import NAME, Recorder, assert_same_bits, metrics, recorded, refused, results, stored

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[1]


def wait_for(path):
  """Waits until a path exists."""
  deadline = time.monotonic() + 100
  while not path.exists():
    assert time.monotonic() < deadline, path
    time.sleep(0.05)


def snapshot(folder):
  """Returns the content of all files of a folder."""
  return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != LOCK}


# Locks.


def test_a_second_training_is_refused_and_an_evaluation_is_not(whole, tiny, tmp_path, monkeypatch):
  """Both start while a batch of the first training is made, which then ends as if alone."""
  config = tiny(**{'training.evaluate_every': 4})

  def next_(self, made=Recorder.__next__):
    if self.step == 4:
      monkeypatch.setattr(Recorder, '__next__', made)
      wait_for(tmp_path / 'run' / 'checkpoints' / '4')  # it is saved asynchronously
      before = snapshot(tmp_path / 'run')
      refused(config, tmp_path / 'run', r'another command is training in .*/run; wait for it, or stop it: process \d+')
      assert snapshot(tmp_path / 'run') == before
      assert evaluate.evaluate(config, str(tmp_path / 'run'))['checkpoint']['step'] == 4
    return made(self)

  monkeypatch.setattr(Recorder, '__next__', next_)
  assert recorded(config, tmp_path / 'run') == whole[1]
  assert_same_bits(tmp_path / 'run', whole[0])
  assert metrics(tmp_path / 'run') == metrics(whole[0])
  assert results(tmp_path / 'run') == results(whole[0])


def test_two_new_trainings_do_not_both_begin(tiny, tmp_path, monkeypatch):
  """The second one starts and ends while the first one loads its initial weights."""
  config, load = tiny(**{'training.epochs': 1.0}), train.initial_state

  def initial_state(run):
    monkeypatch.setattr(train, 'initial_state', load)
    train.train(config, str(tmp_path / 'run'))
    return load(run)

  monkeypatch.setattr(train, 'initial_state', initial_state)
  refused(config, tmp_path / 'run', r'another command has trained in .*/run meanwhile; run the same command again')
  assert [line['step'] for line in metrics(tmp_path / 'run')] == [1, 2, 3, 3]


def test_a_conversion_needs_the_lock(tiny, whole, tmp_path):
  config = dataclasses.replace(tiny(), init_from=str(whole[0]))
  with lock_folder(tmp_path / 'run', 'x'), pytest.raises(UserError, match='another command is training in'):
    convert(config, str(tmp_path / 'run'))
  assert [path.name for path in (tmp_path / 'run').iterdir()] == [LOCK]


HOLD = """
import pathlib, sys, time
from mevit_jax.files import lock_folder
with lock_folder(pathlib.Path(sys.argv[1]), 'busy'):
  print('locked', flush=True)
  time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
  process = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  with process:
    assert process.stdout.readline() == 'locked\n'
    with pytest.raises(UserError, match=rf'^busy; wait for it, or stop it: process {process.pid} on \S+$'):
      lock_folder(tmp_path, 'busy').__enter__()
    process.send_signal(signal.SIGKILL)
  with lock_folder(tmp_path, 'busy'):
    assert (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr('mevit_jax.files.fcntl', SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
  with lock_folder(tmp_path, 'busy'):
    assert 'this file system has no locks; start only one command at a time' in caplog.text


# A full disk.


@pytest.mark.slow
def test_a_disk_that_fills_costs_the_steps_since_the_last_checkpoint(whole, tiny, tmp_path, monkeypatch):
  """The message names the file; the same command resumes exactly."""
  config = tiny(**{'training.evaluate_every': 4})

  def next_(self, made=Recorder.__next__):
    if self.step == 3:
      while not (tmp_path / 'run/checkpoints/2').exists():  # it is written meanwhile
        time.sleep(0.01)
      stack.enter_context(full_disk(20_000))  # less than the parameters
    return made(self)

  with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
    patch.setattr(Recorder, '__next__', next_)
    with pytest.raises(UserError, match=r'checkpoints/4 cannot be written: .*from step 2$') as raised:
      recorded(config, tmp_path / 'run')
  assert '\n' not in str(raised.value)
  assert {path.name for path in (tmp_path / 'run/checkpoints').iterdir()} == {'2'}
  assert recorded(config, tmp_path / 'run') == whole[1][2:]
  assert_same_bits(tmp_path / 'run', whole[0])
  assert metrics(tmp_path / 'run') == metrics(whole[0])


def test_an_interrupted_conversion_goes_on(tiny, whole, tmp_path):
  """The disk is full while the checkpoint is written; the same command then converts."""
  config = dataclasses.replace(tiny(), init_from=str(whole[0]))
  with pytest.raises(UserError, match='checkpoints/0 cannot be written'), full_disk(20_000):
    convert(config, str(tmp_path / 'run'))
  half = tmp_path / 'run/checkpoints/0.orbax-checkpoint-tmp'  # as a killed process leaves it
  (half / 'params').mkdir(parents=True)
  convert(config, str(tmp_path / 'run'))
  assert {path.name for path in (tmp_path / 'run/checkpoints').iterdir()} == {'0'}
  assert stored(tmp_path / 'run')[1].keys() == stored(whole[0])[1].keys()
  with pytest.raises(UserError, match='already has checkpoints'):
    convert(config, str(tmp_path / 'run'))


# Evaluations of other data.


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """A data_dir with other videos of the same classes, under the same name and as the dataset `other`."""
  data_dir = tmp_path_factory.mktemp('other')
  shards.write(moving_shapes.build(data_dir, {'train': 8, 'validation': 9}, seed=1, frames=8, size=24))
  shutil.copytree(data_dir / 'moving_shapes', data_dir / 'other')
  return data_dir


def test_evaluating_other_data_replaces_nothing(whole, tiny, tmp_path, other):
  """Each dataset has its folder, and its row in the model card."""
  run = shutil.copytree(whole[0], tmp_path / 'run')
  before = snapshot(run)
  fingerprint = datasets.open_split(other, 'other', 'validation').fingerprint
  names = [f'{NAME}-{dataset}-{fingerprint[:8]}' for dataset in ('moving_shapes', 'other')]
  for dataset, name in zip(('moving_shapes', 'other'), names, strict=True):
    found = evaluate.evaluate(tiny(**{'data.data_dir': str(other), 'data.dataset': dataset}), str(run))
    assert (found['videos'], found['protocol']['name']) == (9, name)
    assert found['dataset'] == {'name': dataset, 'split': 'validation', 'fingerprint': fingerprint}
    assert results(run, name)['videos'] == 9
  assert before.items() <= snapshot(run).items()
  card = (export_checkpoint(run, 'mevit', tmp_path / 'shared').path.parent / 'README.md').read_text()
  rows = [line.split(' | ') for line in card.splitlines() if line.startswith(f'| {NAME}')]
  own = results(run)['dataset']['fingerprint'][:12]
  assert [(row[0].removeprefix('| '), row[1], row[2]) for row in rows] == [
    (NAME, f'`moving_shapes` (fingerprint `{own}`)', '11'),
    (names[0], f'`moving_shapes` (fingerprint `{fingerprint[:12]}`)', '9'),
    (names[1], f'`other` (fingerprint `{fingerprint[:12]}`)', '9'),
  ]
  entries = yaml.safe_load(card.split('---\n')[1])['model-index'][0]['results']
  assert [entry['dataset']['name'] for entry in entries] == ['moving_shapes', 'moving_shapes', 'other']
  assert [entry['metrics'][0]['name'] for entry in entries] == [f'Top-1 accuracy ({name})' for name in (NAME, *names)]


@pytest.mark.parametrize(
  ('changes', 'name'),
  [
    ({}, NAME),
    ({'data.short_side': (20,), 'data.workers': 1, 'evaluation.batch_size': 16}, NAME),
    ({'data.sampling': 'uniform'}, f'{NAME}-uniform'),
    ({'data.stride': 3}, f'{NAME}-stride3'),
    ({'data.sampling': 'uniform', 'data.stride': 3}, f'{NAME}-uniform'),
  ],
  ids=str,
)
def test_other_clips_have_another_name(tiny, shapes_dir, changes, name):
  split = datasets.open_split(shapes_dir, 'moving_shapes', 'validation')
  trained = SimpleNamespace(config=tiny(), dataset=SimpleNamespace(fingerprint=split.fingerprint))
  assert evaluate.evaluation_name(tiny(**changes), split, trained) == name
