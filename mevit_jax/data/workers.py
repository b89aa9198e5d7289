"""Worker processes for data loading: they end with their parent, ignore signals meant for it, and report crashes."""

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

_LIKELY_CAUSES = {
  'SIGKILL': 'probably out of memory; use fewer data.workers',
  'SIGBUS': 'shared memory (/dev/shm) is full; enlarge it (docker: --shm-size) or use fewer data.workers',
  'SIGSEGV': 'a library crashed, probably while decoding this video; remove the video or update PyAV',
}

# In a worker process: file that records the example each worker is reading, and this worker's offset in it.
_current_file = -1
_current_offset = 0


class WorkerBatches(Iterator[Any]):
  """Iterator over batches built by worker processes, in order; `close()` it.

  Args:
    batches: dataset of batches, assigned to the workers in turn.
    workers: number of worker processes.
    describe: function that names the example with a given index, for error messages.

  Raises:
    UserError: a worker process died; the message has the likely cause and the example it was reading.
  """

  def __init__(self, batches: grain.IterDataset, workers: int, describe: Callable[[int], str]):
    if not flags.FLAGS.is_parsed():  # in a notebook or a test; Grain needs parsed flags to start workers
      flags.FLAGS.mark_as_parsed()
    self._workers, self._describe, self._num_batches = workers, describe, 0
    self._current = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
    self._current.truncate(8 * workers)
    initialize = partial(_initialize_worker, self._current.fileno())
    self._batches = iter(batches.mp_prefetch(grain.MultiprocessingOptions(workers, 1), worker_init_fn=initialize))

  def __next__(self) -> Any:
    try:
      batch = next(self._batches)
    except RuntimeError as error:
      match = re.match(r'Worker process was terminated .* exit code (-?\d+)', str(error))
      if not match:
        raise
      raise UserError(self._describe_crash(int(match[1]))) from None
    self._num_batches += 1
    return batch

  def close(self) -> None:
    """Stops the worker processes."""
    gc.collect()  # frees batches in reference cycles, whose shared memory Python would report as leaked at exit
    self._batches.close()
    self._current.close()

  def _describe_crash(self, code: int) -> str:
    """Describes why the worker that owns the next batch died."""
    worker = self._num_batches % self._workers
    number = int.from_bytes(os.pread(self._current.fileno(), 8, 8 * worker), 'little')
    example = f' while reading {self._describe(number - 1)}' if number else ''
    if code >= 0:
      return f'data worker process {worker} exited with code {code}{example}; see its error output above'
    name = signal.Signals(-code).name
    cause = f': {_LIKELY_CAUSES[name]}' if name in _LIKELY_CAUSES else ''
    return f'data worker process {worker} was killed by {name}{example}{cause}'


def record_current_example(index: int) -> None:
  """Records, in a worker process, the example being read, so that a crash can name it."""
  if _current_file >= 0:
    os.pwrite(_current_file, (index + 1).to_bytes(8, 'little'), _current_offset)


def _initialize_worker(current_file: int, worker: int, count: int) -> None:
  """Initializes a worker process."""
  global _current_file, _current_offset
  del count
  parent = multiprocessing.parent_process()
  assert parent is not None
  with contextlib.suppress(OSError):  # without /proc a crash cannot name its example
    _current_file, _current_offset = os.open(f'/proc/{parent.pid}/fd/{current_file}', os.O_RDWR), 8 * worker
  # Ctrl-C and schedulers signal all processes of a run; the trainer still needs batches to finish its step and save.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  end_with_parent()
