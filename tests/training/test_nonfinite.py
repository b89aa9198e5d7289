"""Step monitor: means, dropped updates, and errors that end a run."""

import math

import numpy as np
import pytest

from mevit_jax.training.nonfinite import NonFiniteError, StepMonitor


def metrics(loss, skipped=False):
  return {'loss': np.float32(loss), 'gradient_norm': np.float32(1), 'skipped': np.bool_(skipped)}


def monitor_of(losses, stop=False):
  """Builds a monitor of steps in flight; a NaN loss is a dropped update."""
  monitor = StepMonitor(stop, lambda used: [f'video{i}' for i in used])
  for step, loss in enumerate(losses, 1):
    monitor.add(step, np.asarray([step, 100 + step]), metrics(loss, math.isnan(loss)))
  return monitor


def test_means_cover_steps_drained_since_the_last_call():
  monitor = monitor_of([1.0, 2.0, 3.0, 4.0])
  monitor.drain(2)
  assert monitor.means() == {'loss': 1.5, 'gradient_norm': 1.0, 'skipped': 0}
  monitor.drain()
  assert monitor.means()['loss'] == 3.5


def test_dropped_updates_are_counted_and_logged_and_excluded_from_means(caplog):
  monitor = monitor_of([1.0, math.nan, 3.0, math.nan])
  monitor.drain()
  assert monitor.means() == {'loss': 2.0, 'gradient_norm': 1.0, 'skipped': 2}
  assert caplog.messages == [
    f'step {step}: loss nan, gradient norm 1: update dropped; videos: video{step} video{100 + step}' for step in (2, 4)
  ]


def test_only_dropped_updates():
  monitor = monitor_of([math.nan])
  monitor.drain()
  means = monitor.means()
  assert math.isnan(means['loss'])
  assert means['skipped'] == 1


def test_the_first_dropped_update_ends_a_run(caplog):
  monitor = monitor_of([1.0, 2.0, math.nan, 4.0], stop=True)
  monitor.drain(2)
  with pytest.raises(
    NonFiniteError, match=r'loss nan, gradient norm 1 at step 3; .* training\.on_nonfinite=skip'
  ) as raised:
    monitor.drain(1)
  assert '\n' not in str(raised.value)
  assert 'video3 video103' in caplog.text


def test_ten_consecutive_dropped_updates_end_any_run():
  monitor_of(([math.nan] * 9 + [1.0]) * 3).drain()
  with pytest.raises(NonFiniteError, match='at step 12, the last of 10 consecutive'):
    monitor_of([1.0, 1.0] + [math.nan] * 12).drain()
