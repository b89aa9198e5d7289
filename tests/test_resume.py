"""Killed, stopped, damaged or diverging runs resume exactly, or fail with the reason."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from mevit_jax import evaluate, train
from mevit_jax import experiment as runs
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import read_workdir
from mevit_jax.config import experiment
from mevit_jax.data import pipeline
from mevit_jax.data.sampling import Sampling
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError
from mevit_jax.video.decode import VideoError
from mevit_jax.workdirs import check_workdir, create_workdir
from tests.helpers.workdirs import NAME, Recorder, after, assert_same_bits, metrics, recorded, refused, results, stored

pytestmark = pytest.mark.usefixtures('compile_once')

ROOT = Path(__file__).parents[1]


def test_resume_is_bitwise_after_a_stop(whole, tiny, tmp_path):
  """Stops before step 4, one step after the checkpoint of step 2, and right after the checkpoint of step 4."""
  workdir, batches = whole
  config = tiny(**{'training.evaluate_every': 4})
  assert recorded(config, tmp_path / 'run', stop=4) == batches[:3]
  assert stored(tmp_path / 'run')[0] == 2
  assert recorded(config, tmp_path / 'run', stop=5) == batches[2:4]
  assert stored(tmp_path / 'run')[0] == 4
  assert recorded(config, tmp_path / 'run') == batches[4:]
  assert_same_bits(tmp_path / 'run', workdir)
  assert metrics(tmp_path / 'run') == metrics(workdir)
  assert results(tmp_path / 'run') == results(workdir)


KILLED = """
import json, os, signal, sys
from mevit_jax import train
from mevit_jax.config import experiment
from mevit_jax.checkpoint.manager import CheckpointManager

save = CheckpointManager.save
def save_and_die(self, state, about):
  save(self, state, about)
  if int(state.step) == 4:
    os.kill(os.getpid(), signal.SIGKILL)
CheckpointManager.save = save_and_die
train.train(experiment.from_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


def test_resume_is_bitwise_after_a_kill_during_a_checkpoint(whole, tiny, tmp_path):
  workdir, batches = whole
  config = tiny(**{'training.evaluate_every': 4})
  command = [sys.executable, '-c', KILLED, json.dumps(experiment.to_dict(config)), str(tmp_path / 'run')]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == -signal.SIGKILL, done.stderr
  step, _ = stored(tmp_path / 'run')
  assert step in (2, 4)
  assert recorded(config, tmp_path / 'run') == batches[step:]
  assert_same_bits(tmp_path / 'run', workdir)
  assert metrics(tmp_path / 'run') == metrics(workdir)


def test_killed_evaluation_is_repeated_on_resume(whole, tiny, tmp_path):
  run = after(4, whole[0], tmp_path / 'run')
  lines = (run / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (run / 'metrics.jsonl').write_text(''.join(lines[:4]))  # step 4, without its evaluation
  train.train(tiny(**{'training.evaluate_every': 4}), str(run))
  assert metrics(run) == metrics(whole[0])


def test_resume_with_other_devices_and_workers_continues_with_the_next_batch(whole, tiny, tmp_path, capsys):
  """Also with other intervals, and a profile of the remaining steps of 3 to 99."""
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


def test_a_finished_run_is_only_evaluated_again(whole, tiny, tmp_path):
  workdir, _ = whole
  run = after(6, workdir, tmp_path / 'run')
  assert recorded(tiny(**{'training.evaluate_every': 4}), run) == []
  assert (run / 'metrics.jsonl').read_bytes() == (workdir / 'metrics.jsonl').read_bytes()
  assert results(run) == results(workdir)


# Stopped by a signal, damaged, or diverging.


def test_a_signal_saves_a_checkpoint_and_exits(whole, tiny, tmp_path, monkeypatch, capsys):
  """The signal arrives between two checkpoints while a batch is prepared; the run resumes exactly."""
  workdir, batches = whole
  config = tiny(**{'training.evaluate_every': 4})

  def next_(self, made=Recorder.__next__):
    if self.step == 2:
      signal.raise_signal(signal.SIGTERM)
    return made(self)

  with monkeypatch.context() as patch:
    patch.setattr(Recorder, '__next__', next_)
    with pytest.raises(SystemExit) as left:
      recorded(config, tmp_path / 'run')
  assert left.value.code == 128 + signal.SIGTERM
  assert 'stopped by SIGTERM at step 3, checkpoint saved; run the same command to resume' in capsys.readouterr().out
  assert stored(tmp_path / 'run')[0] == 3
  assert recorded(config, tmp_path / 'run') == batches[3:]
  assert_same_bits(tmp_path / 'run', workdir)
  assert metrics(tmp_path / 'run') == metrics(workdir)


def test_lines_after_a_stop_cover_the_same_steps(tiny, shapes_dir, tmp_path, monkeypatch):
  """A stop between two log lines writes none; the next line is of all steps since the last one."""
  config = tiny(**{'training.log_every': 4, 'training.save_every': 100})
  read, unreadable = pipeline.decode, datasets.open_split(shapes_dir, 'moving_shapes', 'train').source[3]['video']

  def decode(data, times, num_frames=None):
    if data == unreadable:
      raise VideoError('it is unreadable')
    return read(data, times, num_frames)

  def next_(self, made=Recorder.__next__):
    if self.step == 2:
      signal.raise_signal(signal.SIGTERM)
    return made(self)

  monkeypatch.setattr(pipeline, 'decode', decode)
  recorded(config, tmp_path / 'whole')
  with monkeypatch.context() as patch:
    patch.setattr(Recorder, '__next__', next_)
    with pytest.raises(SystemExit):
      recorded(config, tmp_path / 'run')
  assert (stored(tmp_path / 'run')[0], metrics(tmp_path / 'run')) == (3, [])
  recorded(config, tmp_path / 'run')
  lines = [line for line in metrics(tmp_path / 'run') if 'train/loss' in line]
  assert metrics(tmp_path / 'run') == metrics(tmp_path / 'whole')
  assert [line['step'] for line in lines] == [4, 6]
  assert sum(line['train/unreadable'] for line in lines) == 2  # once an epoch


def test_a_signal_stops_an_evaluation_which_is_repeated_on_resume(whole, tiny, tmp_path, monkeypatch, capsys):
  workdir, batches = whole
  config, run = tiny(**{'training.evaluate_every': 4}), after(2, workdir, tmp_path / 'run')
  made = pipeline.eval_batches

  def eval_batches(*arguments, **options):
    signal.raise_signal(signal.SIGTERM)
    return made(*arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'eval_batches', eval_batches)
    with pytest.raises(SystemExit):
      train.train(config, str(run))
  assert 'stopped by SIGTERM at step 4, checkpoint saved' in capsys.readouterr().out
  assert not (run / 'evaluation').exists()
  assert recorded(config, run) == batches[4:]
  assert metrics(run) == metrics(workdir)


@pytest.mark.slow
def test_workers_ignore_signals(whole, tiny, tmp_path, monkeypatch):
  """Ctrl-C and schedulers also signal the workers."""

  def next_(self, made=Recorder.__next__):
    workers = [one for one in psutil.Process().children() if 'spawn_main' in ' '.join(one.cmdline())]
    assert workers or self.step == 0  # workers start with the first batch
    for worker in workers:
      worker.send_signal(signal.SIGINT)
      worker.send_signal(signal.SIGTERM)
    return made(self)

  monkeypatch.setattr(Recorder, '__next__', next_)
  assert recorded(tiny(**{'data.workers': 1}), tmp_path / 'run') == whole[1]


def test_a_damaged_checkpoint_resumes_from_the_previous_one(whole, tiny, tmp_path, caplog):
  workdir, batches = whole
  run = after(4, workdir, tmp_path / 'run')
  largest = max((run / 'checkpoints/4/params').rglob('*'), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  found = evaluate.evaluate(tiny(), str(run))
  assert found['checkpoint'] == {'step': 2, 'weights': 'raw'}
  assert recorded(tiny(**{'training.evaluate_every': 4}), run) == batches[2:]
  assert caplog.text.count('checkpoints/4 is damaged, using step 2 instead: params/') == 2
  assert_same_bits(run, workdir)


def test_a_diverging_run_stops_and_reports_the_batch(tiny, shapes_dir, tmp_path, caplog):
  """The state before the non-finite update is saved: the same command stops there again."""
  config = tiny(**{'optimizer.learning_rate': 1e38, 'training.save_every': 4})
  source = datasets.open_split(shapes_dir, 'moving_shapes', 'train').source
  _, second = itertools.islice(pipeline.train_batches(source, config.clip, Sampling(), batch_size=8), 2)
  named = f'update dropped; videos: {" ".join(source[int(i)]["id"] for i in second["used"])}'
  for _ in range(2):
    with pytest.raises(UserError, match=r'(loss|gradient norm) (nan|inf) at step 2; .* is saved'):
      train.train(config, str(tmp_path / 'run'))
    assert named in caplog.text
    caplog.clear()
    step, params = stored(tmp_path / 'run')
    assert step == 1
    assert all(np.isfinite(x).all() for x in params.values())


@pytest.mark.slow
def test_ema_parameters_are_evaluated_and_resumed(tiny, tmp_path):
  """Skipped non-finite updates are counted in the metrics."""
  config = tiny(**{'training.ema': 0.5, 'training.on_nonfinite': 'skip'})
  assert train.train(config, str(tmp_path / 'whole'))['checkpoint'] == {'step': 6, 'weights': 'ema'}
  recorded(config, tmp_path / 'run', stop=4)
  recorded(config, tmp_path / 'run')
  one, other = (load_checkpoint(tmp_path / name, weights='ema').params for name in ('whole', 'run'))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  raw = evaluate.evaluate(tiny(**{'evaluation.weights': 'raw'}), str(tmp_path / 'run'))
  assert raw['checkpoint'] == {'step': 6, 'weights': 'raw'}
  assert (tmp_path / 'run/evaluation' / f'{NAME}-raw/results.json').exists()
  diverging = tiny(**{'optimizer.learning_rate': 1e38, 'training.on_nonfinite': 'skip', 'training.epochs': 3.0})
  train.train(diverging, str(tmp_path / 'skips'))
  dropped = [line['train/skipped'] for line in metrics(tmp_path / 'skips') if 'train/skipped' in line]
  assert dropped == [0.0] + [1.0] * 8


@pytest.mark.slow
def test_resume_is_bitwise_after_kills_at_random_times():
  command = [sys.executable, '-m', 'benchmarks.fault_injection', '--kills=5', '--steps=60', '--seed=1']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '5 kills' in done.stdout


@pytest.mark.slow
def test_damaged_files_are_named_or_harmless():
  command = [sys.executable, '-m', 'benchmarks.fault_injection', '--kills=0', '--faults=140']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '140 faults' in done.stdout


# Workdirs that must not be resumed.


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'model.width': 32}, r'model\.width: 16 -> 32'),
    ({'model.block_size': 1, 'training.seed': 7}, r'model\.block_size: 2 -> 1; training\.seed: 0 -> 7'),
    ({'training.batch_size': 16}, r'training\.batch_size: 8 -> 16'),
    ({'training.accumulate': 1, 'training.label_smoothing': 0.1}, r'training\.label_smoothing: 0.0 -> 0.1'),
    ({'training.epochs': 1.0}, r'training\.epochs: 2.0 -> 1.0 \(they may only be raised\)'),
    ({'optimizer.learning_rate': 0.2}, r'optimizer\.learning_rate: 0.1 -> 0.2'),
    ({'data.stride': 1}, r'data\.stride: 2 -> 1'),
    ({'augment.flip': True}, r'augment\.flip: False -> True'),
  ],
  ids=str,
)
def test_a_workdir_of_a_different_run_is_refused(whole, tiny, changes, match):
  workdir, _ = whole
  files = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  refused(tiny(**changes), workdir, rf'belongs to a different run \(saved -> requested\): {match}')
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == files


def test_more_epochs_go_on_as_if_they_had_been_asked_for_at_once(whole, tiny, tmp_path):
  """With a schedule that does not depend on them; config.json has the new number."""
  workdir, batches = whole
  run = after(6, workdir, tmp_path / 'run')
  longer = tiny(**{'training.evaluate_every': 4, 'training.epochs': 3.0})
  at_once = recorded(longer, tmp_path / 'at once')
  assert at_once[:6] == batches
  assert recorded(longer, run) == at_once[6:]
  assert_same_bits(run, tmp_path / 'at once')
  assert [line for line in metrics(run) if line['step'] > 6] == [
    line for line in metrics(tmp_path / 'at once') if line['step'] > 6
  ]
  assert read_workdir(run)['config']['training']['epochs'] == 3.0
  refused(tiny(), run, r'training\.epochs: 3.0 -> 2.0 \(they may only be raised\).*init_from')


def test_more_epochs_of_a_cosine_schedule_are_refused(tiny, tmp_path):
  cosine = {'optimizer.schedule': 'cosine'}
  create_workdir(runs.prepare_run(tiny(**cosine), tmp_path / 'run'))
  refused(
    tiny(**cosine, **{'training.epochs': 3.0}),
    tmp_path / 'run',
    rf'epochs: 2.0 -> 3.0 \(the cosine schedule depends on them\).*--config\.init_from={tmp_path}/run',
  )


def test_a_workdir_of_different_data_is_refused(whole, tiny, tmp_path):
  shards.write(moving_shapes.build(tmp_path, {'train': 24, 'validation': 11}, seed=1, frames=8, size=24))
  refused(tiny(**{'data.data_dir': str(tmp_path)}), whole[0], r'dataset fingerprint: \w{12}(, and | -> )\w{12}')


@pytest.mark.parametrize('damage', ['missing', 'one byte'])
def test_a_lost_config_json_is_restored_from_a_checkpoint(whole, tiny, tmp_path, damage):
  run = after(6, whole[0], tmp_path / 'run')
  path = run / 'config.json'
  text = path.read_text()
  path.unlink() if damage == 'missing' else path.write_text(text.replace('moves_left', 'moves_lift'))
  refused(tiny(**{'model.width': 32}), run, 'belongs to a different run')
  assert path.exists() == (damage != 'missing')
  train.train(tiny(**{'training.evaluate_every': 4}), str(run))
  assert path.read_text() == text


def test_paths_performance_and_intervals_may_differ_on_resume(whole, tiny):
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
  check_workdir(runs.prepare_run(tiny(**changes), whole[0]))
