"""Throughput of the prediction of many files."""

from types import SimpleNamespace

import pytest

from mevit_jax.inference import batch


@pytest.fixture
def clock(monkeypatch):
  clock = SimpleNamespace(now=100.0)
  monkeypatch.setattr(batch, 'time', SimpleNamespace(monotonic=lambda: clock.now))
  return clock


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0.013, '; then 12 clips'), (1.5, '; then 12 clips'), (8.0, '; then 12 clips in 8.0 s: 1.5 clips/s')],
)
def test_a_rate_is_stated_only_where_the_time_is_longer_than_the_cold_start(clock, seconds, text):
  throughput = batch.Throughput(start=97.0)
  clock.now += 4
  throughput.add(8)
  clock.now += seconds
  throughput.add(12)
  assert str(throughput).endswith(text)
  assert 'cold start 7.0 s (checkpoint loaded in 3.0 s, 8 clips compiled and predicted in 4.0 s)' in str(throughput)


def test_one_batch_has_no_rate(clock):
  throughput = batch.Throughput(start=97.0)
  clock.now += 4
  throughput.add(8)
  assert 'then' not in str(throughput)
