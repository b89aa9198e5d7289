"""Worker processes that make batches: they end with their parent, leave signals to it, and do not die unexplained."""

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grain
from absl import flags

from mevit_jax.datasets.processes import end_with_parent
from mevit_jax.errors import UserError

_WHY = {
  'SIGKILL': 'the system kills so where memory runs out, and then fewer data.workers need less',
  'SIGBUS': 'shared memory (/dev/shm) is full: give it more room (docker: --shm-size), or use fewer data.workers',
  'SIGSEGV': 'a fault in a library, probably in decoding that video: leave it out, or update PyAV',
}

_notes = -1  # in a worker: the file that says what it reads, and where in it is this worker's number
_place = 0


class WorkerBatches(Iterator[Any]):
  """Batches that worker processes make, in order; `close()` it.

  Args:
    batches: what the workers make, dealt to them in turn.
    workers: how many.
    name: of the example with this index, for a message.

  Raises:
    UserError: a worker was killed: by what, and what it was reading.
  """

  def __init__(self, batches: grain.IterDataset, workers: int, name: Callable[[int], str]):
    if not flags.FLAGS.is_parsed():  # in a notebook or a test: Grain reads its flags to start them
      flags.FLAGS.mark_as_parsed()
    self._workers, self._name, self._made = workers, name, 0
    self._reading = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it; nothing of it stays, however this ends)
    self._reading.truncate(8 * workers)
    begin = partial(_begin, self._reading.fileno())
    self._batches = iter(batches.mp_prefetch(grain.MultiprocessingOptions(workers, 1), worker_init_fn=begin))

  def __next__(self) -> Any:
    try:
      batch = next(self._batches)
    except RuntimeError as error:
      died = re.match(r'Worker process was terminated .* exit code (-?\d+)', str(error))
      if not died:
        raise
      raise UserError(self._obituary(int(died[1]))) from None
    self._made += 1
    return batch

  def close(self) -> None:
    """Ends the workers."""
    gc.collect()  # batches in reference cycles: else Python warns at its end that their shared memory is leaked
    self._batches.close()
    self._reading.close()

  def _obituary(self, code: int) -> str:
    """Why the worker whose turn it is does not answer."""
    worker = self._made % self._workers
    number = int.from_bytes(os.pread(self._reading.fileno(), 8, 8 * worker), 'little')
    where = f' while it read {self._name(number - 1)}' if number else ''
    if code >= 0:
      return f'worker process {worker} of the data ended{where}, with exit code {code}; what it said stands above'
    kind = signal.Signals(-code).name
    why = f': {_WHY[kind]}' if kind in _WHY else ''
    return f'worker process {worker} of the data was killed by {kind}{where}{why}'


def note_reading(index: int) -> None:
  """In a worker process: says that it now reads this example, for the case that it dies of it."""
  if _notes >= 0:
    os.pwrite(_notes, (index + 1).to_bytes(8, 'little'), _place)


def _begin(notes: int, worker: int, count: int) -> None:
  """What a worker process does first."""
  global _notes, _place
  del count
  parent = multiprocessing.parent_process()
  assert parent is not None
  with contextlib.suppress(OSError):  # without /proc there are no notes
    _notes, _place = os.open(f'/proc/{parent.pid}/fd/{notes}', os.O_RDWR), 8 * worker
  # Ctrl-C and schedulers signal all processes of a run, whose trainer may still have a step to finish and save.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  end_with_parent()
