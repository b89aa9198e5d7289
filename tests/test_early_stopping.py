"""Early stopping, evaluating from a workdir alone, and the pixel statistics of a run."""

import json
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from mevit_jax import train
from mevit_jax.checkpoint.reader import load_checkpoint, read_best
from mevit_jax.cli import command
from mevit_jax.cli import evaluate as evaluate_command
from mevit_jax.datasets.reader import open_split
from mevit_jax.errors import UserError
from tests.helpers.workdirs import NAME, metrics, results

pytestmark = pytest.mark.usefixtures('compile_once')

# Without learning no evaluation is better than the first.
STILL = {
  'optimizer.learning_rate': 0.0,
  'training.evaluate_every': 1,
  'training.patience': 2,
  'training.log_every': 9,
  'data.sampling': 'uniform',
}


@pytest.fixture(scope='module')
def stopped(tiny, tmp_path_factory):
  """Returns the workdir of a run that early stopping ended after three of six steps."""
  workdir = tmp_path_factory.mktemp('stopped') / 'run'
  train.train(tiny(**STILL), str(workdir))
  return workdir


def evaluated_steps(workdir):
  return [line['step'] for line in metrics(workdir) if f'{NAME}/top1' in line]


def test_training_ends_when_no_evaluation_is_better(stopped):
  assert evaluated_steps(stopped) == [1, 2, 3]
  assert read_best(stopped)['step'] == 1
  best = results(stopped, f'{NAME}-best')
  assert (best['checkpoint']['step'], best['top1']) == (1, results(stopped)['top1'])
  assert best['clip'] == {'frames': 2, 'sampling': 'uniform'}  # the stride is one of dense sampling
  report = (stopped / 'evaluation' / f'{NAME}-best' / 'report.html').read_text()
  assert all(
    text in report for text in ('Baseline: linear classifier', 'id="diagnosis-table"', 'loss by training step')
  )


def test_the_same_command_trains_no_further_until_the_patience_changes(stopped, tiny, capsys):
  train.train(tiny(**STILL), str(stopped))
  assert load_checkpoint(stopped).step == 3
  assert 'early stopping at step 3 of 6' in capsys.readouterr().out
  train.train(tiny(**{**STILL, 'training.patience': 0}), str(stopped))
  assert load_checkpoint(stopped).step == 6
  assert evaluated_steps(stopped) == [1, 2, 3, 4, 5, 6]


def test_a_log_line_has_the_loss_and_accuracy_of_guessing(tiny, tmp_path, capsys):
  train.train(tiny(**{'training.epochs': 0.3, 'data.mean': (), 'data.std': ()}), str(tmp_path / 'run'))
  out = capsys.readouterr().out
  assert '(ln C 2.08)  accuracy' in out  # ln 8
  assert '% (chance 12.5 %)' in out
  # Chosen by `resolve`, printed, and kept with the weights.
  split = open_split(tiny().data.data_dir, 'moving_shapes', 'train')
  assert f'config.data.mean: () -> {split.normalization.mean} (pixels of the dataset moving_shapes)' in out
  assert load_checkpoint(tmp_path / 'run').normalization == split.normalization


def run_evaluate(monkeypatch, *arguments):
  """Runs `mevit evaluate` in this process."""
  existing = set(flags.FLAGS)
  monkeypatch.setattr(sys, 'argv', ['evaluate', *arguments])
  try:
    command.define(evaluate_command)
    with flagsaver.flagsaver():
      evaluate_command.main(flags.FLAGS(sys.argv))
  finally:
    for name in set(flags.FLAGS) - existing:
      delattr(flags.FLAGS, name)


def test_a_workdir_alone_is_enough_to_evaluate(whole, monkeypatch):
  workdir, _ = whole
  before = results(workdir)
  run_evaluate(monkeypatch, f'--workdir={workdir}')
  assert {key: results(workdir)[key] for key in ('top1', 'protocol')} == {
    key: before[key] for key in ('top1', 'protocol')
  }
  run_evaluate(monkeypatch, '--workdir', str(workdir), '--config.evaluation.views=2x1')
  found = results(workdir, NAME.replace('1x1', '2x1'))
  assert (found['protocol']['clips'], found['dataset']) == (2, before['dataset'])


def test_a_folder_without_a_run_is_refused_in_one_line(monkeypatch, tmp_path):
  with pytest.raises(SystemExit, match=r'error: .* is not a workdir: it has no config.json'):
    run_evaluate(monkeypatch, f'--workdir={tmp_path}')


def test_equal_clips_of_a_video_are_refused(tiny, tmp_path):
  config = tiny(**{'data.repeated_augmentation': 2, 'data.short_side': (16,)})
  with pytest.raises(UserError, match='would repeat the same clip'):
    train.train(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_baselines_are_in_results_and_metrics(whole):
  found = results(whole[0])['baselines']
  line = next(line for line in metrics(whole[0]) if f'{NAME}/top1' in line)
  assert line[f'{NAME}/linear_baseline'] == found['linear']['top1']
  assert json.dumps(found)
