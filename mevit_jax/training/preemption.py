"""Asked to stop: signals and notices of pre-emption, heard between two steps."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopError(Exception):
  """Training was asked to stop by a signal, and all that it needs to go on is saved."""

  def __init__(self, number: signal.Signals):
    super().__init__(number.name)
    self.signal = number


class Stop:
  """Hears SIGTERM and SIGINT while it is entered; a second SIGINT (Ctrl-C) ends the process at once.

  With several processes, jax hears SIGTERM, entered or not: a notice to any of them becomes one step at which all stop.

  Attributes:
    signal: that came, or None.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._many = jax.process_count() > 1
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> 'Stop':
    if threading.current_thread() is threading.main_thread():  # Python lets no other set them
      for number in (signal.SIGINT,) if self._many else (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._hear)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> bool:
    """Whether to save after this step, and stop; every process asks after every step, and gets the same answer."""
    if self._many and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return self.signal is not None

  def check(self) -> None:
    """Raises StopError if a signal came: for where all is saved."""
    if self.signal is not None:
      raise StopError(self.signal)

  @contextlib.contextmanager
  def during_evaluation(self, step: int = 0) -> Iterator[Callable[[], None]]:
    """Gives what every process is to call after every batch of an evaluation after this step; it is `check`."""
    batches = itertools.count(step + 1)

    def check() -> None:
      self.asked(next(batches))
      self.check()

    yield check
    self.asked(step)  # jax stops all at the number after the largest that it was asked last: steps count on from here

  def _hear(self, number: int, frame) -> None:
    del frame
    os.write(2, b'stopping after this step, once it is saved\n')  # print() could be what the signal interrupted
    if number == signal.SIGINT:
      os.write(2, b'Ctrl-C again ends it at once\n')
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    if self._many:
      signal.raise_signal(signal.SIGTERM)
    else:
      self.signal = signal.Signals(number)
