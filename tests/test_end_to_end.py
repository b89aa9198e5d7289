"""End to end: training, evaluation, and the files that they write."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mevit_jax import evaluate, train
from mevit_jax.cli import dry_run
from mevit_jax.cli import train as cli_train
from mevit_jax.config import experiment
from mevit_jax.config import flags as config_flags
from mevit_jax.data import pipeline
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError
from mevit_jax.evaluation.results import read_results
from mevit_jax.video.decode import VideoError
from tests.helpers.workdirs import NAME, after, metrics, of_format_1, probabilities, results, without_labels

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[1]


def test_files_of_a_run(whole, shapes_dir, tiny):
  workdir, batches = whole
  assert {path.name for path in workdir.iterdir()} == {
    'config.json', 'checkpoints', 'best.json', 'metrics.jsonl', 'tensorboard', 'evaluation', '.lock',
  }  # fmt: skip
  split = datasets.open_split(shapes_dir, 'moving_shapes', 'train')
  about = json.loads((workdir / 'config.json').read_text())
  assert (about['class_names'], about['fingerprint']) == (list(split.class_names), split.fingerprint)
  config = tiny(**{'training.evaluate_every': 4, 'model.classes': 8})
  assert experiment.from_dict(about['config']) == config
  assert {int(path.name) for path in (workdir / 'checkpoints').iterdir()} == {2, 4, 6}
  assert [step for step, *_ in batches] == [1, 2, 3, 4, 5, 6]
  assert sorted(index for _, rows, *_ in batches[:3] for index in rows) == list(range(24))  # one epoch
  assert list((workdir / 'tensorboard').iterdir())


def test_metrics_of_a_run(whole):
  lines = metrics(whole[0])
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 6]
  training = [line for line in lines if 'train/loss' in line]
  for i, line in enumerate(training, 1):
    assert line['step'] == i
    assert line['train/epoch'] == pytest.approx(i / 3)
    assert line['train/learning_rate'] == pytest.approx(0.1 * 8 / 64)
    assert 0 < line['train/loss'] < 10
    assert line['train/accuracy'] * 8 in range(9)
    assert line['train/unreadable'] == 0
  assert [line for line in lines if f'{NAME}/top1' in line][-1] == {
    'step': 6, **{f'{NAME}/{top}': results(whole[0])[top] for top in ('top1', 'top5', 'loss')},
    **{f'{NAME}/{name}_baseline': results(whole[0])['baselines'][name]['top1'] for name in ('linear', 'majority')},
  }  # fmt: skip


def test_training_ends_with_an_evaluation(whole, shapes_dir):
  workdir, _ = whole
  split = datasets.open_split(shapes_dir, 'moving_shapes', 'validation')
  folder = workdir / 'evaluation' / NAME
  assert {path.name for path in folder.iterdir()} == {
    'results.json', 'predictions.csv', 'logits.npz', 'videos.png', 'report.html',
  }  # fmt: skip
  found = results(workdir)
  assert (found['videos'], found['unreadable'], found['checkpoint']['step']) == (11, 0, 6)
  assert found['dataset'] == {'name': 'moving_shapes', 'split': 'validation', 'fingerprint': split.fingerprint}
  assert found['protocol'] == {
    'name': NAME, 'split': 'validation', 'clips': 1, 'crops': 1, 'views': '1x1', 'average': 'probabilities',
    'batch_size': 8, 'weights': 'auto', 'checkpoint': 'last',
  }  # fmt: skip
  assert (found['clip']['frames'], found['clip']['sampling']) == (2, 'dense')
  with (folder / 'predictions.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  ids = [example['id'] for example in split.source]
  assert [row['id'] for row in rows] == ids == list(probabilities(workdir))
  assert sum(row['correct'] == '1' for row in rows) == found['top1_correct'] == round(11 * found['top1'])
  with Image.open(folder / 'videos.png') as image:
    assert image.width > 500


def test_unreadable_videos_in_training_are_counted_and_logged_once(tiny, shapes_dir, tmp_path, caplog, whole):
  source = datasets.open_split(shapes_dir, 'moving_shapes', 'train').source
  unusable = source[3]
  read = pipeline.decode

  def decode(data, times, num_frames):
    if data == unusable['video']:
      raise VideoError('it has rotted')
    return read(data, times, num_frames)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, 'decode', decode)
    train.train(tiny(), str(tmp_path / 'run'))
  counts = [line['train/unreadable'] for line in metrics(tmp_path / 'run') if 'train/loss' in line]
  assert counts[:2] != counts[2:]
  assert sum(counts) == 2  # it is sampled once per epoch
  named = [line for line in caplog.messages if 'rotted' in line]
  assert named == [f"unreadable video, replaced by another one: video '{unusable['id']}': it has rotted"]


# The evaluate command.


def test_evaluate_equals_the_evaluation_at_the_end_of_training(whole, tmp_path):
  """From the command line, with a config file outside of the package."""
  workdir, _ = whole
  run = after(6, workdir, tmp_path / 'run')
  config = json.loads((workdir / 'config.json').read_text())['config']
  (tmp_path / 'own.py').write_text(
    'from mevit_jax.config import flags as config_flags\n\n'
    'def get_config():\n'
    '  config = config_flags.default_config()\n'
    f'  config.update({config!r})\n'
    '  return config\n'
  )
  command = [sys.executable, 'main.py', f'--config={tmp_path}/own.py', f'--workdir={run}', '--mode=evaluate']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert (done.returncode, done.stderr) == (0, '')
  assert f'evaluation {NAME} at step 6: top-1' in done.stdout
  assert results(run) == results(workdir)
  for video, row in probabilities(workdir).items():
    np.testing.assert_allclose(probabilities(run)[video], row, rtol=1e-5)
  assert (run / 'evaluation' / NAME / 'videos.png').exists()


def test_devices_and_batch_size_do_not_change_predictions(whole, tiny, tmp_path):
  workdir, _ = whole
  run = after(6, workdir, tmp_path / 'run')
  evaluate.evaluate(tiny(**{'mesh.data': 1, 'evaluation.batch_size': 5}), str(run))
  found, expected = results(run), results(workdir)
  for name in ('videos', 'top1_correct', 'top5_correct', 'dataset', 'preprocessing', 'clip'):
    assert found[name] == expected[name], name
  for video, row in probabilities(workdir).items():
    np.testing.assert_allclose(probabilities(run)[video], row, rtol=1e-5)


def test_another_protocol_has_its_own_folder(whole, tiny, tmp_path):
  run = after(6, whole[0], tmp_path / 'run')
  found = evaluate.evaluate(tiny(**{'evaluation.clips': 2, 'evaluation.split': 'train'}), str(run))
  assert json.loads(json.dumps(found)) == results(run, 'train-2x1')
  assert (found['videos'], found['dataset']['split']) == (24, 'train')


def test_the_best_checkpoint_can_be_evaluated(whole, tiny):
  workdir, _ = whole
  best = json.loads((workdir / 'best.json').read_text())
  found = evaluate.evaluate(tiny(**{'evaluation.checkpoint': 'best'}), str(workdir))
  assert (found['checkpoint']['step'], found['top1']) == (best['step'], best['top1'])
  assert results(workdir, f'{NAME}-best') == json.loads(json.dumps(found))
  shutil.rmtree(workdir / 'evaluation' / f'{NAME}-best')


def test_stored_results_of_the_other_average_equal_its_evaluation(whole, tiny, tmp_path):
  """No second evaluation is needed: the logits of one evaluation contain the results of the other average."""
  run = after(6, whole[0], tmp_path / 'run')
  found = evaluate.evaluate(tiny(**{'evaluation.views': '3x1'}), str(run))
  other = evaluate.evaluate(tiny(**{'evaluation.views': '3x1', 'evaluation.average': 'logits'}), str(run))
  (_, kept, _), (_, others, _) = (
    read_results(run / 'evaluation' / name) for name in ('validation-3x1', 'validation-3x1-logits')
  )
  assert kept.logits.tobytes() == others.logits.tobytes()
  np.testing.assert_array_equal(dataclasses.replace(kept, average='logits').probabilities, others.probabilities)
  assert found['averages'] == other['averages']
  for result, average in ((found, 'probabilities'), (other, 'logits')):
    assert result['averages'][average] == {name: result[name] for name in ('top1', 'top5')}


def test_a_split_without_labels_gives_predictions_and_no_accuracy(whole, tiny, tmp_path, monkeypatch, capsys):
  run = after(6, whole[0], tmp_path / 'run')
  without_labels(monkeypatch)
  found = evaluate.evaluate(tiny(), str(run))
  assert (found['videos'], found['unlabeled']) == (11, 11)
  assert 'top1' not in found
  assert f'evaluation {NAME} at step 6: 11 videos, 11 unlabeled: ' in capsys.readouterr().out
  folder = run / 'evaluation' / NAME
  assert {path.name for path in folder.iterdir()} == {
    'results.json', 'predictions.csv', 'logits.npz', 'submission.csv', 'videos.png', 'report.html',
  }  # fmt: skip
  assert len((folder / 'submission.csv').read_text().splitlines()) == 11
  for video, row in probabilities(whole[0]).items():
    np.testing.assert_allclose(probabilities(run)[video], row, rtol=1e-5)


def test_evaluating_a_different_model_is_refused(whole, tiny):
  with pytest.raises(UserError, match=r'a different model \(saved -> requested\): model.block_size: 2 -> 1'):
    evaluate.evaluate(tiny(**{'model.block_size': 1}), str(whole[0]))


def test_evaluating_a_dataset_with_other_classes_is_refused(whole, tiny, tmp_path, monkeypatch):
  names = ('moves_up', *moving_shapes.CLASS_NAMES[1:3], 'moves_right', *moving_shapes.CLASS_NAMES[4:])
  monkeypatch.setattr(moving_shapes, 'CLASS_NAMES', names)
  shards.write(moving_shapes.build(tmp_path, {'train': 8, 'validation': 8}, frames=4, size=16))
  with pytest.raises(UserError, match=r"classes of .* differ .*class 0: 'moves_right' -> 'moves_up'"):
    evaluate.evaluate(tiny(**{'data.data_dir': str(tmp_path)}), str(whole[0]))


def test_evaluating_a_folder_that_is_not_a_workdir_writes_nothing(tiny, tmp_path):
  with pytest.raises(UserError, match=r'typo is not a workdir: it has no config\.json'):
    evaluate.evaluate(tiny(), str(tmp_path / 'typo'))
  assert not (tmp_path / 'typo').exists()


def test_evaluating_a_workdir_of_an_older_version_is_refused(whole, tiny, tmp_path):
  older = of_format_1(whole[0], tmp_path / 'older')
  with pytest.raises(UserError, match=r'config\.json has format 1; this version of mevit_jax reads format 3'):
    evaluate.evaluate(tiny(), str(older))
  assert not (older / 'evaluation').exists()


# Other commands.


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
  train.dry_run(tiny(), str(tmp_path / 'run'))
  assert not list(tmp_path.iterdir())
  output = capsys.readouterr().out
  for part in ('8,952 parameters', 'training step: loss 2.0794', 'an evaluation step'):
    assert part in output


def test_dry_run_needs_no_workdir(tiny, tmp_path, monkeypatch, capsys):
  values = dict.fromkeys(('config', 'workdir', 'coordinator', 'processes', 'process_id'))
  for module in (dry_run, cli_train):
    monkeypatch.setattr(module, 'flags', types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values)))
  monkeypatch.setattr(config_flags, 'parse_config', lambda _: tiny())
  monkeypatch.chdir(tmp_path)
  dry_run.main(['dry-run'])
  assert not list(tmp_path.iterdir())
  assert 'an evaluation step' in capsys.readouterr().out


def test_help_works_without_arguments():
  done = subprocess.run([sys.executable, 'main.py', '--help'], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert '--workdir' in done.stdout
  assert '--mode' in done.stdout
  assert 'Traceback' not in done.stdout + done.stderr


@pytest.mark.slow
def test_demo_classifies_eight_motions(tmp_path):
  """Like launch/demo.sh: prepares the dataset and trains with the demo config; about five minutes on two cores."""

  environment = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}  # like a user's environment

  def run(*command):
    done = subprocess.run(
      [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr

  run('-m', 'mevit_jax', 'prepare', 'moving_shapes', f'--data_dir={tmp_path}/data')
  run('main.py', '--config=configs/demo.py', f'--workdir={tmp_path}/run', f'--config.data.data_dir={tmp_path}/data')
  found = results(tmp_path / 'run')
  assert found['top1'] >= 0.95
  assert found['unreadable'] == 0
