"""Progress of long work: a tqdm bar on terminals, an occasional line in log files."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

_LOG_SECONDS = 10


class Progress:
  """Reports how much is done, how fast, and how long the rest takes.

  Args:
    description: what is counted: 'videos written'.
    file: where to print; None is standard output.
    log_seconds: seconds between two lines where the output is not a terminal.
  """

  def __init__(self, description: str, file: TextIO | None = None, log_seconds: float = _LOG_SECONDS):
    self._description, self._file, self._log_seconds = description, file, log_seconds
    self._start = self._last = time.monotonic()
    self._initial: int | None = None
    self._bar: tqdm | None = None

  def __call__(self, done: int, total: int) -> None:
    """Shows that `done` of `total` are done; the first call says what an earlier run had done already."""
    file = self._file or sys.stdout
    if self._initial is None:
      self._initial = done
      self._last = float('-inf')
    if file.isatty():
      self._bar = self._bar or tqdm(desc=self._description, total=total, initial=done, file=file, leave=True)
      self._bar.update(done - self._bar.n)
      if done >= total:
        self._bar.close()
      return
    now = time.monotonic()
    if done < total and now - self._last < self._log_seconds:
      return
    self._last = now
    line = f'{self._description}: {done} of {total}'
    if done > self._initial:
      rate = (done - self._initial) / max(now - self._start, 1e-9)
      line += f', {rate:.1f}/s' + (f', {tqdm.format_interval((total - done) / rate)} left' if done < total else '')
    print(line, file=file, flush=True)
