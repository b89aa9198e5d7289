"""Preemption: stops training after a step on SIGTERM or SIGINT."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopError(Exception):
  """Training stops because of a signal; its state is saved."""

  def __init__(self, number: signal.Signals):
    super().__init__(number.name)
    self.signal = number


class PreemptionHandler:
  """Handles SIGTERM and SIGINT within its context; a second SIGINT (Ctrl-C) ends the process at once.

  With several processes, JAX handles SIGTERM, also outside the context: a signal to any of them makes all stop at the
  same step.

  Attributes:
    signal: signal received, or None.
  """

  def __init__(self) -> None:
    self.signal: signal.Signals | None = None
    self._multiprocess = jax.process_count() > 1
    self._previous: dict[signal.Signals, Any] = {}

  def __enter__(self) -> 'PreemptionHandler':
    if threading.current_thread() is threading.main_thread():  # signals can only be set there
      for number in (signal.SIGINT,) if self._multiprocess else (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def should_stop(self, step: int) -> bool:
    """Returns whether to save and stop after this step; call it on every process after every step."""
    if self._multiprocess and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return self.signal is not None

  def check(self) -> None:
    """Raises StopError if a signal was received; call it once the state is saved."""
    if self.signal is not None:
      raise StopError(self.signal)

  @contextlib.contextmanager
  def during_evaluation(self, step: int = 0) -> Iterator[Callable[[], None]]:
    """Yields a function to call on every process after every batch of the evaluation after this step; it may raise."""
    batches = itertools.count(step + 1)

    def check() -> None:
      self.should_stop(next(batches))
      self.check()

    yield check
    self.should_stop(step)  # JAX stops at the number after the largest last call: go back to steps

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    os.write(2, b'stopping after this step; saving a checkpoint\n')  # print() is not reentrant
    if number == signal.SIGINT:
      os.write(2, b'press Ctrl-C again to exit at once\n')
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    if self._multiprocess:
      signal.raise_signal(signal.SIGTERM)
    else:
      self.signal = signal.Signals(number)
