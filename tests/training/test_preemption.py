"""Signals: heard while training, and only then; the second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys

import jax
import pytest
from jax.experimental import multihost_utils

from mevit_jax.training.preemption import Stop, StopError


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard(number, capfd):
  before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
  with Stop() as stop:
    assert not stop.asked(1)
    stop.check()
    os.kill(os.getpid(), number)
    assert stop.asked(2)
    with pytest.raises(StopError) as raised:
      stop.check()
  assert raised.value.signal == number
  said = 'stopping after this step, once it is saved\n'
  assert capfd.readouterr().err == said + 'Ctrl-C again ends it at once\n' * (number == signal.SIGINT)
  assert {one: signal.getsignal(one) for one in before} == before


def test_many_notices_are_one():
  with Stop() as stop:
    for _ in range(3):
      signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


def test_the_second_interrupt_ends_the_process():
  script = 'import signal\nfrom mevit_jax.training.preemption import Stop\nwith Stop():\n  for _ in "ab":\n    '
  done = subprocess.run([sys.executable, '-c', f'{script}signal.raise_signal(signal.SIGINT)'], capture_output=True)
  assert done.returncode == -signal.SIGINT


def test_many_processes_stop_at_the_step_that_jax_names(monkeypatch):
  """jax hears SIGTERM itself, and Ctrl-C is passed on to it."""
  raised = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda step: step == 7)
  monkeypatch.setattr(signal, 'raise_signal', raised.append)
  before = signal.getsignal(signal.SIGTERM)
  with Stop() as stop:
    assert signal.getsignal(signal.SIGTERM) == before
    os.kill(os.getpid(), signal.SIGINT)
    assert raised == [signal.SIGTERM]
    assert [stop.asked(step) for step in (6, 7)] == [False, True]
    with pytest.raises(StopError, match='SIGTERM'):
      stop.check()


def test_evaluations_have_numbers_of_their_own_and_steps_go_on_after_them(monkeypatch):
  """jax stops all processes at the number after the largest that any of them asked last."""
  asked = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda n: asked.append(n) or asked.count(n) > 1)
  stop = Stop()
  assert not stop.asked(7)
  with stop.during_evaluation(8) as check:
    check()
    check()
  assert asked == [7, 9, 10, 8]
  with pytest.raises(StopError, match='SIGTERM'), stop.during_evaluation(8) as check:
    check()
  assert asked == [7, 9, 10, 8, 9]


def test_an_evaluation_of_one_process_is_stopped_by_a_signal():
  with Stop() as stop, stop.during_evaluation() as check:
    check()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(StopError, match='SIGINT'):
      check()
