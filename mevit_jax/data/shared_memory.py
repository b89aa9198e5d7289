"""Batches in shared memory without a name, passed from a worker process to its parent.

Named shared memory, as files in /dev/shm, stays when all processes of a run are killed together. This memory (Linux's
memfd) is freed with the last process that maps it, however that ends, and the size of /dev/shm does not limit it.
"""

import contextlib
import mmap
import os
import pickle
from collections import deque
from typing import Any

_ALIGNMENT = 64  # bytes; jax on CPUs copies arrays that are aligned less


class SharedBatch:
  """A batch whose arrays are in shared memory of the process that made this object.

  A process that receives it (unpickles it) maps the memory at once: its maker may end before the batch is opened.

  Args:
    batch: any structure of arrays.

  Attributes:
    fd: file descriptor of the memory in that process; the memory can be opened while it is open.
  """

  def __init__(self, batch: Any):
    buffers: list[pickle.PickleBuffer] = []
    self._pickled = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    self._slices, end = list[slice](), 0
    for buffer in buffers:
      start = -(-end // _ALIGNMENT) * _ALIGNMENT
      end = start + buffer.raw().nbytes
      self._slices.append(slice(start, end))
    self._size, self._process, self.fd = max(end, 1), os.getpid(), os.memfd_create('mevit-batch')
    self._memory: memoryview | None = None
    os.ftruncate(self.fd, self._size)
    with open(self.fd, 'wb', closefd=False) as file:
      for part, buffer in zip(self._slices, buffers, strict=True):
        file.seek(part.start)
        file.write(buffer.raw())

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    with contextlib.suppress(FileNotFoundError):  # `open` raises it
      self._memory = self._map()

  def open(self) -> Any:
    """Returns the batch; its arrays keep the memory alive.

    Raises:
      FileNotFoundError: the process that made this object had ended, or closed `fd`, before it was received.
    """
    memory = self._map() if self._memory is None else self._memory
    return pickle.loads(self._pickled, buffers=[memory[part] for part in self._slices])

  def _map(self) -> memoryview:
    fd = os.open(f'/proc/{self._process}/fd/{self.fd}', os.O_RDWR)
    try:
      return memoryview(mmap.mmap(fd, self._size))
    finally:
      os.close(fd)


class Sharer:
  """Makes shared batches in a worker process, and frees its own hold on those that the parent has opened."""

  def __init__(self) -> None:
    self._open: deque[int] = deque()  # file descriptors, oldest first
    self._closed = 0

  def share(self, batch: Any, num_received: int) -> SharedBatch:
    """Puts a batch into shared memory.

    Args:
      batch: any structure of arrays.
      num_received: number of batches of this process that its parent has opened.
    """
    while self._closed < num_received:
      os.close(self._open.popleft())
      self._closed += 1
    shared = SharedBatch(batch)
    self._open.append(shared.fd)
    return shared
