"""A look at the steps: waiting for them, their means, and which were dropped."""

import math

import numpy as np
import pytest

from mevit_jax.training.nonfinite import NonFiniteError, Watch


def metrics(loss, skipped=False):
  return {'loss': np.float32(loss), 'gradient_norm': np.float32(1), 'skipped': np.bool_(skipped)}


def watch_of(losses, stops=False):
  """A watch with these steps under way; NaN is one whose update was dropped."""
  watch = Watch(stops, lambda used: [f'video{i}' for i in used])
  for step, loss in enumerate(losses, 1):
    watch.add(step, np.asarray([step, 100 + step]), metrics(loss, math.isnan(loss)))
  return watch


def test_means_are_of_what_is_settled_since_the_last():
  watch = watch_of([1.0, 2.0, 3.0, 4.0])
  watch.settle(2)
  assert watch.means() == {'loss': 1.5, 'gradient_norm': 1.0, 'skipped': 0}
  watch.settle()
  assert watch.means()['loss'] == 3.5


def test_dropped_steps_are_counted_and_named_and_in_no_mean(capsys):
  watch = watch_of([1.0, math.nan, 3.0, math.nan])
  watch.settle()
  assert watch.means() == {'loss': 2.0, 'gradient_norm': 1.0, 'skipped': 2}
  assert capsys.readouterr().out.splitlines() == [
    f'step {step}: loss nan, gradient norm 1: its update was dropped; its videos: video{step} video{100 + step}'
    for step in (2, 4)
  ]


def test_nothing_but_dropped_steps():
  watch = watch_of([math.nan])
  watch.settle()
  means = watch.means()
  assert math.isnan(means['loss'])
  assert means['skipped'] == 1


def test_the_first_stops_a_run_that_is_to_stop(capsys):
  watch = watch_of([1.0, 2.0, math.nan, 4.0], stops=True)
  watch.settle(2)
  with pytest.raises(
    NonFiniteError, match=r'loss nan, gradient norm 1 at step 3: .* training\.on_nonfinite=skip'
  ) as raised:
    watch.settle(1)
  assert '\n' not in str(raised.value)
  assert 'video3 video103' in capsys.readouterr().out


def test_ten_in_a_row_stop_any_run():
  watch_of(([math.nan] * 9 + [1.0]) * 3).settle()
  with pytest.raises(NonFiniteError, match='at step 12, the last of 10 in a row'):
    watch_of([1.0, 1.0] + [math.nan] * 12).settle()
