"""From files to results: training, killing, resuming, evaluating; and what is refused before anything is written."""

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from PIL import Image
from workdirs import MEASURED, NAME, after

from mevit_jax import evaluate, recipes, runs, train
from mevit_jax.data import datasets, pipeline, shards
from mevit_jax.data.builders import moving_shapes
from mevit_jax.data.video import VideoError
from mevit_jax.errors import UserError
from mevit_jax.evaluation.results import read_results
from mevit_jax.models.functional import names_of
from mevit_jax.training.saved import open_saved

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[1]


class KilledError(Exception):
  pass


class Recorder:
  """Batches for the trainer, each noted in `seen`; the one of step `stop` ends it."""

  def __init__(self, made, step, seen, stop=None):
    self.made, self.step, self.seen, self.stop = made, step, seen, stop

  def __next__(self):
    self.step += 1
    if self.step == self.stop:
      raise KilledError
    batch = next(self.made)
    self.seen.append((self.step, batch['index'].tolist(), batch['label'].tolist(), batch['video'].tobytes()))
    return batch

  def close(self):
    self.made.close()


def recorded(recipe, workdir, stop=None):
  """Trains; returns the batches, as (step, index, label, pixels)."""
  original, seen = pipeline.train_batches, []

  def train_batches(*arguments, start_step, **options):
    return Recorder(original(*arguments, start_step=start_step, **options), start_step, seen, stop)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, 'train_batches', train_batches)
    try:
      train.train(recipe, str(workdir))
    except KilledError:
      assert stop
  return seen


def stored(workdir):
  """The newest checkpoint's step, and its parameters by name."""
  saved = open_saved(workdir)
  params = saved.params('raw')
  return saved.step, {name: np.asarray(x) for name, x in zip(names_of(params), jax.tree.leaves(params), strict=True)}


def assert_same_bits(workdir, other):
  (step, params), (other_step, others) = stored(workdir), stored(other)
  assert (step, params.keys()) == (other_step, others.keys())
  for name, x in params.items():
    assert x.tobytes() == others[name].tobytes(), name


def metrics(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def results(workdir, name=NAME):
  return json.loads((workdir / 'evaluation' / name / 'results.json').read_text())


def probabilities(workdir, name=NAME):
  _, predictions, _ = read_results(workdir / 'evaluation' / name)
  return dict(zip(predictions.ids.tolist(), predictions.probabilities, strict=True))


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory, compile_once):
  """A run of six steps that nothing interrupts, and its batches."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  return workdir, recorded(tiny(**{'training.evaluate_every': 4}), workdir)


def test_what_a_run_leaves(whole, shapes_dir, tiny):
  workdir, batches = whole
  assert {path.name for path in workdir.iterdir()} == {
    'config.json', 'checkpoints', 'best.json', 'metrics.jsonl', 'tensorboard', 'evaluation',
  }  # fmt: skip
  split = datasets.open_split(shapes_dir, 'moving_shapes', 'train')
  about = json.loads((workdir / 'config.json').read_text())
  assert (about['class_names'], about['fingerprint']) == (list(split.class_names), split.fingerprint)
  recipe = tiny(**{'training.evaluate_every': 4, 'model.classes': 8})
  assert recipes.recipe_of(about['recipe']) == recipe
  assert {int(path.name) for path in (workdir / 'checkpoints').iterdir()} == {2, 4, 6}
  assert [step for step, *_ in batches] == [1, 2, 3, 4, 5, 6]
  assert sorted(index for _, rows, *_ in batches[:3] for index in rows) == list(range(24))  # an epoch
  assert list((workdir / 'tensorboard').iterdir())


def test_metrics(whole):
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
    'step': 6, **{f'{NAME}/{top}': results(whole[0])[top] for top in ('top1', 'top5')},
  }  # fmt: skip


def test_evaluation_at_the_end(whole, shapes_dir):
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


def test_videos_that_are_unreadable_while_training_are_counted_and_named_once(
  tiny, shapes_dir, tmp_path, capsys, whole
):
  source = datasets.open_split(shapes_dir, 'moving_shapes', 'train').source
  dead = source[3]
  read = pipeline.decode

  def decode(data, times):
    if data == dead['video']:
      raise VideoError('it has rotted')
    return read(data, times)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, 'decode', decode)
    train.train(tiny(), str(tmp_path / 'run'))
  counts = [line['train/unreadable'] for line in metrics(tmp_path / 'run') if 'train/loss' in line]
  assert counts[:2] != counts[2:]
  assert sum(counts) == 2  # it is asked for once an epoch
  named = [line for line in capsys.readouterr().out.splitlines() if 'rotted' in line]
  assert named == [f"unreadable, and another one was taken: video '{dead['id']}': it has rotted"]


# Killed, and started again.


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(whole, tiny, tmp_path):
  """Twice: before step 4, and so a step after the checkpoint of step 2; and right after that of step 4."""
  workdir, batches = whole
  recipe = tiny(**{'training.evaluate_every': 4})
  assert recorded(recipe, tmp_path / 'run', stop=4) == batches[:3]
  assert stored(tmp_path / 'run')[0] == 2
  assert recorded(recipe, tmp_path / 'run', stop=5) == batches[2:4]
  assert stored(tmp_path / 'run')[0] == 4
  assert recorded(recipe, tmp_path / 'run') == batches[4:]
  assert_same_bits(tmp_path / 'run', workdir)
  assert metrics(tmp_path / 'run') == metrics(workdir)
  assert results(tmp_path / 'run') == results(workdir)


KILLED = """
import json, os, signal, sys
from mevit_jax import recipes, train
from mevit_jax.training.checkpoint import Checkpoints

save = Checkpoints.save
def save_and_die(self, state, about):
  save(self, state, about)
  if int(state.step) == 4:
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_die
train.train(recipes.recipe_of(json.loads(sys.argv[1])), sys.argv[2])
"""


def test_a_run_that_was_killed_in_the_middle_of_a_checkpoint_goes_on(whole, tiny, tmp_path):
  workdir, batches = whole
  recipe = tiny(**{'training.evaluate_every': 4})
  command = [sys.executable, '-c', KILLED, json.dumps(recipes.to_dict(recipe)), str(tmp_path / 'run')]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == -signal.SIGKILL, done.stderr
  step, _ = stored(tmp_path / 'run')
  assert step in (2, 4)
  assert recorded(recipe, tmp_path / 'run') == batches[step:]
  assert_same_bits(tmp_path / 'run', workdir)
  assert metrics(tmp_path / 'run') == metrics(workdir)


def test_an_evaluation_that_was_killed_is_made_up_for(whole, tiny, tmp_path):
  run = after(4, whole[0], tmp_path / 'run')
  lines = (run / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (run / 'metrics.jsonl').write_text(''.join(lines[:4]))  # step 4, and not its evaluation
  train.train(tiny(**{'training.evaluate_every': 4}), str(run))
  assert metrics(run) == metrics(whole[0])


def test_other_devices_and_workers_go_on_with_the_very_next_batch(whole, tiny, tmp_path, capsys):
  """And other intervals, and a profile of what is left of steps 3 to 99."""
  workdir, batches = whole
  run = after(4, workdir, tmp_path / 'run')
  changes = {'mesh.data': 2, 'data.workers': 1, 'training.log_every': 2, 'training.profile': (3, 99)}
  assert recorded(tiny(**changes), run) == batches[4:]
  (step, params), (_, others) = stored(run), stored(workdir)
  assert step == 6
  for name, x in others.items():
    if not name.endswith('key/bias'):
      np.testing.assert_allclose(params[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
  assert [line['step'] for line in metrics(run)] == [1, 2, 3, 4, 4, 6, 6]
  assert list((run / 'profile').rglob('*.pb'))
  assert 'profile of steps 5 to 6' in capsys.readouterr().out


def test_a_run_that_is_done_is_evaluated_again_and_nothing_else(whole, tiny, tmp_path):
  workdir, _ = whole
  run = after(6, workdir, tmp_path / 'run')
  assert recorded(tiny(**{'training.evaluate_every': 4}), run) == []
  assert (run / 'metrics.jsonl').read_bytes() == (workdir / 'metrics.jsonl').read_bytes()
  assert results(run) == results(workdir)


# Asked to stop, hurt, or diverging.


def test_a_run_that_is_asked_to_stop_saves_and_leaves(whole, tiny, tmp_path, monkeypatch, capsys):
  """Between two checkpoints, by a signal that comes while a batch is made; and goes on as if nothing had been."""
  workdir, batches = whole
  recipe = tiny(**{'training.evaluate_every': 4})

  def next_(self, made=Recorder.__next__):
    if self.step == 2:
      signal.raise_signal(signal.SIGTERM)
    return made(self)

  with monkeypatch.context() as patch:
    patch.setattr(Recorder, '__next__', next_)
    with pytest.raises(SystemExit) as left:
      recorded(recipe, tmp_path / 'run')
  assert left.value.code == 128 + signal.SIGTERM
  assert 'stopped by SIGTERM at step 3, saved; the same command goes on' in capsys.readouterr().out
  assert stored(tmp_path / 'run')[0] == 3
  assert recorded(recipe, tmp_path / 'run') == batches[3:]
  assert_same_bits(tmp_path / 'run', workdir)
  assert metrics(tmp_path / 'run') == metrics(workdir)


def test_an_evaluation_is_left_at_once_and_made_up_for(whole, tiny, tmp_path, monkeypatch, capsys):
  workdir, batches = whole
  recipe, run = tiny(**{'training.evaluate_every': 4}), after(2, workdir, tmp_path / 'run')
  made = pipeline.eval_batches

  def eval_batches(*arguments, **options):
    signal.raise_signal(signal.SIGTERM)
    return made(*arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'eval_batches', eval_batches)
    with pytest.raises(SystemExit):
      train.train(recipe, str(run))
  assert 'stopped by SIGTERM at step 4, saved' in capsys.readouterr().out
  assert not (run / 'evaluation').exists()
  assert recorded(recipe, run) == batches[4:]
  assert metrics(run) == metrics(workdir)


@pytest.mark.slow
def test_workers_leave_signals_to_the_trainer(whole, tiny, tmp_path, monkeypatch):
  """Ctrl-C and schedulers signal them too."""

  def next_(self, made=Recorder.__next__):
    workers = [one for one in psutil.Process().children() if 'spawn_main' in ' '.join(one.cmdline())]
    assert workers or self.step == 0  # they start with the first batch
    for worker in workers:
      worker.send_signal(signal.SIGINT)
      worker.send_signal(signal.SIGTERM)
    return made(self)

  monkeypatch.setattr(Recorder, '__next__', next_)
  assert recorded(tiny(**{'data.workers': 1}), tmp_path / 'run') == whole[1]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(whole, tiny, tmp_path, capsys):
  workdir, batches = whole
  run = after(4, workdir, tmp_path / 'run')
  largest = max((run / 'checkpoints/4/params').rglob('*'), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  found = evaluate.evaluate(tiny(), str(run))
  assert found['checkpoint'] == {'step': 2, 'weights': 'raw'}
  assert recorded(tiny(**{'training.evaluate_every': 4}), run) == batches[2:]
  assert capsys.readouterr().out.count('checkpoints/4 is damaged and not used, but that of step 2: params/') == 2
  assert_same_bits(run, workdir)


def test_the_best_is_evaluated_if_asked_for(whole, tiny):
  workdir, _ = whole
  best = json.loads((workdir / 'best.json').read_text())
  found = evaluate.evaluate(tiny(**{'evaluation.checkpoint': 'best'}), str(workdir))
  assert (found['checkpoint']['step'], found['top1']) == (best['step'], best['top1'])
  assert results(workdir, f'{NAME}-best') == json.loads(json.dumps(found))
  shutil.rmtree(workdir / 'evaluation' / f'{NAME}-best')


def test_a_run_that_diverges_stops_and_names_the_batch(tiny, shapes_dir, tmp_path, capsys):
  """Its state stays as it was before, and is saved as such: the same command stops there again."""
  recipe = tiny(**{'optimizer.learning_rate': 1e38, 'training.save_every': 4})
  ids = [example['id'] for example in datasets.open_split(shapes_dir, 'moving_shapes', 'train').source]
  indices = [
    row['used'].tolist()
    for row in itertools.islice(
      pipeline.train_batches(
        datasets.open_split(shapes_dir, 'moving_shapes', 'train').source, recipe.clip, batch_size=8, seed=0
      ),
      2,
    )
  ][1]
  named = f'its update was dropped; its videos: {" ".join(ids[i] for i in indices)}\n'
  for _ in range(2):
    with pytest.raises(UserError, match=r'(loss|gradient norm) (nan|inf) at step 2: .* is saved'):
      train.train(recipe, str(tmp_path / 'run'))
    assert named in capsys.readouterr().out
    step, params = stored(tmp_path / 'run')
    assert step == 1
    assert all(np.isfinite(x).all() for x in params.values())


@pytest.mark.slow
def test_a_running_mean_is_what_is_evaluated_and_goes_on(tiny, tmp_path):
  """And a run that goes on without what is not finite has it counted in its metrics."""
  recipe = tiny(**{'training.ema': 0.5, 'training.on_nonfinite': 'skip'})
  assert train.train(recipe, str(tmp_path / 'whole'))['checkpoint'] == {'step': 6, 'weights': 'ema'}
  recorded(recipe, tmp_path / 'run', stop=4)
  recorded(recipe, tmp_path / 'run')
  one, other = (open_saved(tmp_path / name).params('ema') for name in ('whole', 'run'))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  raw = evaluate.evaluate(tiny(**{'evaluation.weights': 'raw'}), str(tmp_path / 'run'))
  assert raw['checkpoint'] == {'step': 6, 'weights': 'raw'}
  assert (tmp_path / 'run/evaluation' / f'{NAME}-raw/results.json').exists()
  diverging = tiny(**{'optimizer.learning_rate': 1e38, 'training.on_nonfinite': 'skip', 'training.epochs': 3.0})
  train.train(diverging, str(tmp_path / 'skips'))
  dropped = [line['train/skipped'] for line in metrics(tmp_path / 'skips') if 'train/skipped' in line]
  assert dropped == [0.0] + [1.0] * 8


@pytest.mark.slow
def test_killed_at_random_moments():
  command = [sys.executable, '-m', 'benchmarks.kills', '--kills=5', '--steps=60', '--seed=1']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '5 kills' in done.stdout


# Evaluation on its own.


def test_evaluating_is_what_training_ends_with(whole, tmp_path):
  """From the command line, with a config file of one's own."""
  workdir, _ = whole
  run = after(6, workdir, tmp_path / 'run')
  recipe = json.loads((workdir / 'config.json').read_text())['recipe']
  (tmp_path / 'own.py').write_text(
    'from mevit_jax import recipes\n\n'
    'def get_config():\n'
    '  config = recipes.default_config()\n'
    f'  config.update({recipe!r})\n'
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


def test_another_protocol_has_a_folder_of_its_own(whole, tiny, tmp_path):
  run = after(6, whole[0], tmp_path / 'run')
  found = evaluate.evaluate(tiny(**{'evaluation.clips': 2, 'evaluation.split': 'train'}), str(run))
  assert json.loads(json.dumps(found)) == results(run, 'train-2x1')
  assert (found['videos'], found['dataset']['split']) == (24, 'train')


def test_what_was_kept_is_what_another_average_gives(whole, tiny, tmp_path):
  """No second run is needed: the logits of one evaluation hold the other's results."""
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


def without_labels(monkeypatch):
  """Splits that have no labels, as a benchmark's test split."""
  opened = datasets.open_split

  def open_split(*arguments):
    split = opened(*arguments)
    return dataclasses.replace(split, source=[{**example, 'label': -1} for example in split.source])

  monkeypatch.setattr(datasets, 'open_split', open_split)
  monkeypatch.setattr(datasets.Split, 'labels', property(lambda split: np.full(len(split), -1)))


def test_a_split_without_labels_gives_predictions_and_no_accuracy(whole, tiny, tmp_path, monkeypatch, capsys):
  run = after(6, whole[0], tmp_path / 'run')
  without_labels(monkeypatch)
  found = evaluate.evaluate(tiny(), str(run))
  assert (found['videos'], found['unlabelled']) == (11, 11)
  assert 'top1' not in found
  assert f'evaluation {NAME} at step 6: 11 videos  unlabelled 11  ' in capsys.readouterr().out
  folder = run / 'evaluation' / NAME
  assert {path.name for path in folder.iterdir()} == {
    'results.json', 'predictions.csv', 'logits.npz', 'submission.csv', 'videos.png', 'report.html',
  }  # fmt: skip
  assert len((folder / 'submission.csv').read_text().splitlines()) == 11
  for video, row in probabilities(whole[0]).items():
    np.testing.assert_allclose(probabilities(run)[video], row, rtol=1e-5)


def test_training_without_labels_is_refused(tiny, tmp_path, monkeypatch):
  without_labels(monkeypatch)
  refused(tiny(), tmp_path / 'run', r'24 of moving_shapes/train, .* have no label, .* see data\.train_split')
  assert not (tmp_path / 'run').exists()


def test_evaluating_another_model_is_refused(whole, tiny):
  with pytest.raises(UserError, match=r'another model \(there, and now\): model.block_size: 2, and 1'):
    evaluate.evaluate(tiny(**{'model.block_size': 1}), str(whole[0]))


def test_evaluating_a_dataset_with_other_classes_is_refused(whole, tiny, tmp_path, monkeypatch):
  names = ('moves_up', *moving_shapes.CLASS_NAMES[1:3], 'moves_right', *moving_shapes.CLASS_NAMES[4:])
  monkeypatch.setattr(moving_shapes, 'CLASS_NAMES', names)
  shards.write(moving_shapes.build(tmp_path, {'train': 8, 'validation': 8}, frames=4, size=16))
  with pytest.raises(UserError, match=r"other classes .*class 0 is 'moves_right', and 'moves_up'"):
    evaluate.evaluate(tiny(**{'data.data_dir': str(tmp_path)}), str(whole[0]))


def test_evaluating_what_is_no_workdir_writes_nothing(tiny, tmp_path):
  with pytest.raises(UserError, match=r'typo is no workdir: it has no config\.json'):
    evaluate.evaluate(tiny(), str(tmp_path / 'typo'))
  assert not (tmp_path / 'typo').exists()


def test_evaluating_a_workdir_of_an_older_version_is_refused(whole, tiny, tmp_path):
  older = shutil.copytree(whole[0], tmp_path / 'older', ignore=shutil.ignore_patterns('evaluation'))
  about = json.loads((older / 'config.json').read_text())
  (older / 'config.json').write_text(json.dumps({**about, 'format': 1}))
  with pytest.raises(UserError, match=r'config\.json has format 1, this version of mevit_jax reads 2'):
    evaluate.evaluate(tiny(), str(older))
  assert not (older / 'evaluation').exists()


# What is refused, before anything is written.


def refused(recipe, workdir, match):
  with pytest.raises(UserError, match=match) as raised:
    train.train(recipe, str(workdir))
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'training.batch_size': 12}, r'training\.batch_size 12 is not divisible by the 8 devices'),
    ({'training.batch_size': 24, 'training.accumulate': 2}, r'batch_size 24 in 2 parts .* not divisible by the 8'),
    ({'augment.mixup': 0.8}, r'training\.batch_size 8 must be a multiple of 16 \(2 x training\.accumulate 1 x 8 dev'),
    ({'data.repeats': 3}, r'batch_size 8 is not divisible by 6: 2 videos x 3 data\.repeats'),
    ({'data.balance': 1.5}, r'data\.balance must be in \[0, 1\], not 1\.5'),
    ({'mesh.data': 9}, r'mesh\.data is 9, but there are 8 devices'),
    ({'model.classes': 5}, r"model\.classes is 5, but the dataset 'moving_shapes' has 8"),
    ({'data.dataset': 'kinetics400'}, r"no dataset 'kinetics400' in .*; there: moving_shapes; .*mevit_jax\.prepare"),
    ({'data.data_dir': '/nowhere'}, r"no dataset 'moving_shapes' in /nowhere"),
    ({'data.train_split': 'test'}, r"no split 'test'; it has: train, validation"),
    ({'evaluation.split': 'test'}, r"no split 'test'; it has: train, validation"),
  ],
  ids=str,
)
def test_what_cannot_be_leaves_no_workdir(tiny, tmp_path, changes, match):
  refused(tiny(**changes), tmp_path / 'run', match)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'model.block_size': 3}, r'block_size 3 is larger than the 2x2 grid'),
    ({'model.image_size': (20, 16), 'data.short_side': (20,)}, r'image_size \(20, 16\) is no multiple of patch_size'),
  ],
)
def test_a_model_that_cannot_be_is_no_recipe(tiny, changes, match):
  with pytest.raises(UserError, match=match):
    tiny(**changes)


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'model.width': 32}, r'model\.width: 16, and 32'),
    ({'model.block_size': 1, 'training.seed': 7}, r'model\.block_size: 2, and 1; training\.seed: 0, and 7'),
    ({'training.batch_size': 16}, r'training\.batch_size: 8, and 16'),
    ({'training.accumulate': 1, 'training.label_smoothing': 0.1}, r'training\.label_smoothing: 0.0, and 0.1'),
    ({'training.epochs': 3.0}, r'training\.epochs: 2.0, and 3.0'),
    ({'optimizer.learning_rate': 0.2}, r'optimizer\.learning_rate: 0.1, and 0.2'),
    ({'data.stride': 1}, r'data\.stride: 2, and 1'),
    ({'augment.flip': True}, r'augment\.flip: False, and True'),
  ],
  ids=str,
)
def test_a_workdir_of_another_run_is_refused(whole, tiny, changes, match):
  workdir, _ = whole
  files = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  refused(tiny(**changes), workdir, rf'is of another run \(there, and now\): {match}')
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == files


def test_a_workdir_of_other_data_is_refused(whole, tiny, tmp_path):
  shards.write(moving_shapes.build(tmp_path, {'train': 24, 'validation': 11}, seed=1, frames=8, size=24))
  refused(tiny(**{'data.data_dir': str(tmp_path)}), whole[0], r'dataset fingerprint: \w{12}, and \w{12}\.')


def test_checkpoints_without_a_config_are_refused(whole, tiny, tmp_path):
  run = after(6, whole[0], tmp_path / 'run')
  (run / 'config.json').unlink()
  refused(tiny(), run, 'has checkpoints but no config.json')


def test_a_file_is_no_workdir(tiny, tmp_path):
  (tmp_path / 'run').touch()
  refused(tiny(), tmp_path / 'run', 'run is a file: use another workdir')


def test_where_how_fast_and_how_often_may_differ(whole, tiny):
  changes = {
    'mesh.data': 4,
    'data.workers': 3,
    'evaluation.crops': 3,
    'evaluation.batch_size': 4,
    'model.attention': 'plain',
    'model.unroll': 1,
    'model.remat': 'block',
    'training.log_every': 7,
    'training.save_every': 3,
    'training.keep': 1,
    'training.evaluate_every': 5,
    'training.profile': (2, 3),
  }
  runs.check_workdir(runs.prepare_run(tiny(**changes), whole[0]))


# The other ways in.


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
  train.dry_run(tiny(), str(tmp_path / 'run'))
  assert not list(tmp_path.iterdir())
  output = capsys.readouterr().out
  for part in ('8,952 parameters', 'training step: loss 2.0794', 'an evaluation step'):
    assert part in output


def test_help_needs_nothing():
  done = subprocess.run([sys.executable, 'main.py', '--help'], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert '--workdir' in done.stdout
  assert '--mode' in done.stdout
  assert 'Traceback' not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_demo_tells_eight_motions_apart(tmp_path):
  """As launch/demo.sh does it: the dataset made, the recipe as it is; about five minutes on two cores."""

  environment = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}  # as a user has it

  def run(*command):
    done = subprocess.run(
      [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr

  run('-m', 'mevit_jax.prepare', 'moving_shapes', f'--data_dir={tmp_path}/data')
  run('main.py', '--config=configs/demo.py', f'--workdir={tmp_path}/run', f'--config.data.data_dir={tmp_path}/data')
  found = results(tmp_path / 'run')
  assert found['top1'] >= 0.95
  assert found['unreadable'] == 0
