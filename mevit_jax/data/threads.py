"""Mapping a generator function over jobs in threads; video decoding releases the GIL."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Job = TypeVar('Job')
Result = TypeVar('Result')


def map_in_threads(
  function: Callable[[Job], Iterable[Result]], jobs: Iterable[Job], threads: int, ahead: int
) -> Generator[Result, None, None]:
  """Yields the results of `function(job)` for all jobs; results of one job keep their order, jobs interleave.

  An exception in a thread is raised here. Closing the generator ends the threads.

  Args:
    function: function that yields results for a job.
    jobs: the jobs.
    threads: number of threads, each with one job at a time.
    ahead: maximum number of queued results; each thread holds one more.
  """
  results: queue.Queue = queue.Queue(ahead)
  remaining, lock, stopped = iter(jobs), threading.Lock(), threading.Event()

  def put(kind: str, value: object) -> None:
    while not stopped.is_set():
      with contextlib.suppress(queue.Full):
        return results.put((kind, value), timeout=0.1)
    return None

  def work() -> None:
    try:
      while not stopped.is_set():
        with lock:
          job = next(remaining)
        for result in function(job):
          put('result', result)
          if stopped.is_set():
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
      kind, value = results.get()
      if kind == 'error':
        raise value
      if kind == 'end':
        running -= 1
      else:
        yield value
  finally:
    stopped.set()
    for worker in workers:
      worker.join()
