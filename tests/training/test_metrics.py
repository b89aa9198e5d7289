"""Metric output: no duplicates after a kill, and the numbers of a log line."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from mevit_jax.errors import UserError
from mevit_jax.training import metrics as module
from mevit_jax.training.metrics import MetricWriter, Throughput
from tests.helpers.disk import full_disk


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def write(workdir, first, *steps):
  with contextlib.closing(MetricWriter(workdir, first)) as writer:
    for step in steps:
      writer.write(step, {'loss': step / 10}, 'train')


def test_one_line_per_step(tmp_path):
  write(tmp_path, 0, 1, 2)
  assert lines(tmp_path) == [{'step': 1, 'train/loss': 0.1}, {'step': 2, 'train/loss': 0.2}]


def test_metrics_after_the_checkpoint_are_removed(tmp_path):
  write(tmp_path, 0, 1, 2, 3, 4)
  write(tmp_path, 2, 3)
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize('rest', ['{"step": 3, "train/l', '{"step": 3', '{', '\n'])
def test_a_truncated_line_is_removed(tmp_path, rest):
  write(tmp_path, 0, 1, 2)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write(rest)
  write(tmp_path, 2, 3)
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
  'damage',
  ['{"stup": 3}', '3', '[]', '{"step": "3"}', '{"step": 3, "train/loss": "x"}', '{"step": 3.5}', '{"step": true}'],
)
def test_a_damaged_line_that_is_json_is_removed(tmp_path, damage, caplog):
  write(tmp_path, 0, 1, 2)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write(f'{damage}\n')
  write(tmp_path, 2, 3)
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]
  assert 'metrics.jsonl: skipped 1 damaged lines' in caplog.text


def test_lines_are_flushed(tmp_path):
  writer = MetricWriter(tmp_path, 0)
  writer.write(1, {'loss': 1.0}, 'train')
  assert len(lines(tmp_path)) == 1
  writer.close()


def test_non_finite_values_are_null(tmp_path):
  writer = MetricWriter(tmp_path, 0)
  writer.write(1, {'loss': math.nan, 'norm': math.inf, 'accuracy': 0.5}, 'train')
  writer.close()

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  line = json.loads((tmp_path / 'metrics.jsonl').read_text(), parse_constant=refuse)
  assert line == {'step': 1, 'train/loss': None, 'train/norm': None, 'train/accuracy': 0.5}


@pytest.mark.parametrize('limit', [0, 40, 70, 150])
def test_a_full_disk_is_one_line_and_leaves_whole_lines(tmp_path, limit):
  with full_disk(limit), pytest.raises(UserError, match=r'(metrics\.jsonl|tensorboard) cannot be written') as raised:
    write(tmp_path, 0, *range(1, 100))
  assert '\n' not in str(raised.value)
  if (tmp_path / 'metrics.jsonl').exists():
    assert [line['step'] for line in lines(tmp_path)] == list(range(1, len(lines(tmp_path)) + 1))
  write(tmp_path, 0, 1)
  assert [line['step'] for line in lines(tmp_path)] == [1]


def test_metrics_of_a_killed_run_are_detected(tmp_path):
  writer = MetricWriter(tmp_path, 0)
  writer.write(2, {'loss': 1.0}, 'train')
  writer.write(2, {'top1': 1.0}, 'validation-1x1')
  writer.write(4, {'loss': 1.0}, 'train')
  writer.close()
  at_two = MetricWriter(tmp_path, 2)
  assert at_two.has_metrics(2, 'validation-1x1')
  assert at_two.has_metrics(2, 'train')
  assert not at_two.has_metrics(2, 'validation-1x3')
  at_two.close()
  write(tmp_path, 2, 4)
  at_four = MetricWriter(tmp_path, 4)
  assert not at_four.has_metrics(4, 'validation-1x1')
  at_four.close()


def events(workdir):
  """Reads TFRecords: length, checksum, event, checksum."""
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], 'little')
      yield Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def test_tensorboard_events(tmp_path):
  write(tmp_path, 0, 1, 2)
  values = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
  assert values == [(1, 'train/loss', pytest.approx(0.1)), (2, 'train/loss', pytest.approx(0.2))]


@pytest.mark.parametrize('first', [0, 2])
def test_tensorboard_purges_steps_after_the_checkpoint(tmp_path, first):
  write(tmp_path, first, 3)
  restarts = [event.step for event in events(tmp_path) if event.HasField('session_log')]
  assert restarts == [first + 1]


@pytest.fixture
def clock(monkeypatch):
  """Fake clock, set by `now`."""
  clock = SimpleNamespace(now=1000.0)
  fake = SimpleNamespace(
    monotonic=lambda: clock.now, time=lambda: 0.0, localtime=lambda _: (0,) * 9, strftime=lambda *_: '12:00'
  )
  monkeypatch.setattr(module, 'time', fake)
  return clock


MEANS = {'loss': 1.25, 'accuracy': 0.5, 'skipped': 0}


def test_throughput_excludes_compilation(clock):
  progress = Throughput(first=10, last=40, steps_per_epoch=20, batch_size=8)
  progress.add_wait(30.0)  # the first batch
  clock.now += 60
  progress.start(11)  # compiled
  progress.add_wait(1.0)
  clock.now += 4
  values = progress.measure(15)
  assert values == {'clips_per_second': 8.0, 'data_wait': 0.25, 'epoch': 0.75}
  line = progress.line(15, {**MEANS, **values})
  for part in ('step 15/40', 'epoch 0.8', 'loss 1.2500', 'accuracy 50.0 %', '8 clips/s', 'data wait 25 %'):
    assert part in line
  assert '(25 s)' in line  # 25 steps at a second each
  assert 'skipped' not in line
  assert 'skipped 3 ' in progress.line(15, {**MEANS, **values, 'skipped': 3})


def test_throughput_excludes_evaluation(clock):
  progress = Throughput(first=0, last=20, steps_per_epoch=20, batch_size=8)
  progress.start(1)
  clock.now += 2
  progress.measure(5)
  clock.now += 100
  progress.add_pause(100)
  clock.now += 2
  values = progress.measure(9)
  assert values['clips_per_second'] == 16
  assert '(6 s)' in progress.line(9, {**MEANS, **values})


def test_the_step_that_compiles_has_no_speed(clock):
  progress = Throughput(first=0, last=20, steps_per_epoch=20, batch_size=8)
  progress.add_wait(1.0)
  clock.now += 60
  progress.start(1)
  values = progress.measure(1)
  assert math.isnan(values['clips_per_second'])
  assert values['data_wait'] == 0
  assert 'nan' not in progress.line(1, {**MEANS, **values})


@pytest.mark.parametrize(('seconds', 'text'), [(3, '3 s'), (89, '89 s'), (600, '10 min'), (3 * 3600, '3.0 h')])
def test_durations_are_formatted(clock, seconds, text):
  progress = Throughput(first=0, last=2, steps_per_epoch=20, batch_size=8)
  clock.now += seconds
  assert f'({text})' in progress.line(1, {**MEANS, **progress.measure(1)})


def test_the_time_that_is_left_is_estimated_from_the_first_steps(clock):
  progress = Throughput(first=0, last=1000, steps_per_epoch=20, batch_size=8)
  clock.now += 60
  progress.start(1)  # compiled
  clock.now += 30
  assert progress.estimate(4) == (
    '10 s per step: the remaining 996 steps take until about 12:00 (2.8 h), besides evaluations'
  )


def test_a_log_line_has_the_loss_and_accuracy_of_guessing(clock):
  progress = Throughput(first=0, last=20, steps_per_epoch=20, batch_size=8, classes=8)
  clock.now += 1
  line = progress.line(1, {**MEANS, **progress.measure(1)})
  assert 'loss 1.2500 (ln C 2.08)  accuracy 50.0 % (chance 12.5 %)  ' in line
