"""Worker processes for data loading: they end with their parent, ignore signals meant for it, and report crashes."""

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

from mevit_jax.data.shared_memory import SharedBatch, Sharer
from mevit_jax.datasets.processes import end_with_parent
from mevit_jax.errors import UserError

_LIKELY_CAUSES = {
  'SIGKILL': 'probably out of memory; use fewer data.workers',
  'SIGSEGV': 'a library crashed, probably while decoding this video; remove the video or update PyAV',
}

# In a worker process: a file shared with the parent that holds 8-byte integers: 1 + index of the example that each
# worker is reading, then number of each worker's batches that the parent has opened.
_shared_file = -1
_worker = _num_workers = 0


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
    self._shared_file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
    self._shared_file.truncate(16 * workers)
    initialize = partial(_initialize_worker, self._shared_file.fileno())
    shared = batches.map(_ShareBatch())
    self._batches = iter(shared.mp_prefetch(grain.MultiprocessingOptions(workers, 1), worker_init_fn=initialize))

  def __next__(self) -> Any:
    try:
      batch = self._open_next()
    except RuntimeError as error:
      match = re.match(r'Worker process was terminated .* exit code (-?\d+)', str(error))
      if not match:
        raise
      raise UserError(self._describe_crash(int(match[1]))) from None
    turn, worker = divmod(self._num_batches, self._workers)
    os.pwrite(self._shared_file.fileno(), (turn + 1).to_bytes(8, 'little'), 8 * (self._workers + worker))
    self._num_batches += 1
    return batch

  def _open_next(self) -> Any:
    shared = next(self._batches)
    try:
      return shared.open()
    except (
      FileNotFoundError
    ):  # the worker was killed after it had made the batch; Grain says so when its next one is due
      for _ in self._batches:
        pass
      raise UserError(f'data worker process {self._num_batches % self._workers} ended early') from None

  def close(self) -> None:
    """Stops the worker processes."""
    self._batches.close()
    self._shared_file.close()

  def _describe_crash(self, code: int) -> str:
    """Describes why the worker that owns the next batch died."""
    worker = self._num_batches % self._workers
    number = int.from_bytes(os.pread(self._shared_file.fileno(), 8, 8 * worker), 'little')
    example = f' while reading {self._describe(number - 1)}' if number else ''
    if code >= 0:
      return f'data worker process {worker} exited with code {code}{example}; see its error output above'
    name = signal.Signals(-code).name
    cause = f': {_LIKELY_CAUSES[name]}' if name in _LIKELY_CAUSES else ''
    return f'data worker process {worker} was killed by {name}{example}{cause}'


def record_current_example(index: int) -> None:
  """Records, in a worker process, the example being read, so that a crash can name it."""
  if _shared_file >= 0:
    os.pwrite(_shared_file, (index + 1).to_bytes(8, 'little'), 8 * _worker)


class _ShareBatch(grain.transforms.Map):
  """Puts batches into shared memory, in a worker process."""

  def __init__(self) -> None:
    self._sharer = Sharer()

  def map(self, element: Any) -> SharedBatch:
    num_received = os.pread(_shared_file, 8, 8 * (_num_workers + _worker))
    return self._sharer.share(element, int.from_bytes(num_received, 'little'))


def _initialize_worker(shared_file: int, worker: int, count: int) -> None:
  """Initializes a worker process."""
  global _shared_file, _worker, _num_workers
  parent = multiprocessing.parent_process()
  assert parent is not None
  _shared_file, _worker, _num_workers = os.open(f'/proc/{parent.pid}/fd/{shared_file}', os.O_RDWR), worker, count
  # Ctrl-C and schedulers signal all processes of a run; the trainer still needs batches to finish its step and save.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  end_with_parent()
