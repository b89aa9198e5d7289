"""Several iterators at once, each in a thread: decoding lets go of Python's lock."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Job = TypeVar('Job')
Made = TypeVar('Made')


def map_in_threads(
  make: Callable[[Job], Iterable[Made]], jobs: Iterable[Job], threads: int, ahead: int
) -> Generator[Made, None, None]:
  """What `make(job)` yields, of as many jobs at once as there are threads; a job's own in their order.

  No more than `ahead` wait to be taken, and one more in each thread. What a thread raises is raised here. Closing the
  iterator ends the threads.
  """
  waiting: queue.Queue = queue.Queue(ahead)
  left, lock, ended = iter(jobs), threading.Lock(), threading.Event()

  def put(kind: str, what: object) -> None:
    while not ended.is_set():
      with contextlib.suppress(queue.Full):
        return waiting.put((kind, what), timeout=0.1)
    return None

  def work() -> None:
    try:
      while not ended.is_set():
        with lock:
          job = next(left)
        for made in make(job):
          put('made', made)
          if ended.is_set():
            return
    except StopIteration:
      put('end', None)
    except BaseException as error:
      put('error', error)

  workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
  for worker in workers:
    worker.start()
  try:
    running = threads
    while running:
      kind, what = waiting.get()
      if kind == 'error':
        raise what
      if kind == 'end':
        running -= 1
      else:
        yield what
  finally:
    ended.set()
    for worker in workers:
      worker.join()
