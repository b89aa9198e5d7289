"""Signals are handled only during training; the second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys

import jax
import pytest
from jax.experimental import multihost_utils

from mevit_jax.training.preemption import PreemptionHandler, StopError


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_a_stop(number, capfd):
  before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
  with PreemptionHandler() as stop:
    assert not stop.should_stop(1)
    stop.check()
    os.kill(os.getpid(), number)
    assert stop.should_stop(2)
    with pytest.raises(StopError) as raised:
      stop.check()
  assert raised.value.signal == number
  message = 'stopping after this step; saving a checkpoint\n'
  assert capfd.readouterr().err == message + 'press Ctrl-C again to exit at once\n' * (number == signal.SIGINT)
  assert {one: signal.getsignal(one) for one in before} == before


def test_repeated_signals_request_one_stop():
  with PreemptionHandler() as stop:
    for _ in range(3):
      signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


def test_the_second_interrupt_ends_the_process():
  script = 'import signal\nfrom mevit_jax.training.preemption import PreemptionHandler\n'
  script += 'with PreemptionHandler():\n  for _ in "ab":\n    '
  done = subprocess.run([sys.executable, '-c', f'{script}signal.raise_signal(signal.SIGINT)'], capture_output=True)
  assert done.returncode == -signal.SIGINT


def test_all_processes_stop_at_the_same_step(monkeypatch):
  """JAX handles SIGTERM; Ctrl-C is forwarded to it."""
  raised = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda step: step == 7)
  monkeypatch.setattr(signal, 'raise_signal', raised.append)
  before = signal.getsignal(signal.SIGTERM)
  with PreemptionHandler() as stop:
    assert signal.getsignal(signal.SIGTERM) == before
    os.kill(os.getpid(), signal.SIGINT)
    assert raised == [signal.SIGTERM]
    assert [stop.should_stop(step) for step in (6, 7)] == [False, True]
    with pytest.raises(StopError, match='SIGTERM'):
      stop.check()


def test_evaluation_batches_use_separate_sync_points(monkeypatch):
  """JAX stops all processes at the number after the largest last call."""
  synced = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    multihost_utils, 'reached_preemption_sync_point', lambda n: synced.append(n) or synced.count(n) > 1
  )
  stop = PreemptionHandler()
  assert not stop.should_stop(7)
  with stop.during_evaluation(8) as check:
    check()
    check()
  assert synced == [7, 9, 10, 8]
  with pytest.raises(StopError, match='SIGTERM'), stop.during_evaluation(8) as check:
    check()
  assert synced == [7, 9, 10, 8, 9]


def test_a_signal_stops_evaluation():
  with PreemptionHandler() as stop, stop.during_evaluation() as check:
    check()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(StopError, match='SIGINT'):
      check()
