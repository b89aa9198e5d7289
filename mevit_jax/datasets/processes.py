"""Function calls in supervised worker processes: a call that crashes its process is reported, and the others go on.

Every process has a pipe of its own, so that one that is killed at any moment can neither lose the call of another nor
keep a lock.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, wait
from typing import Any

from mevit_jax.errors import UserError

CRASHED = 'crashed'  # the result of a call whose process ended before the call did


def run_in_processes(
  function: Callable[..., Any], calls: deque[tuple], workers: int
) -> Generator[tuple[tuple, Any] | tuple[None, None], None, None]:
  """Yields (arguments, result) as calls finish, and (None, None) at least every second.

  A process that dies is replaced, and the result of its call is CRASHED. All processes end with this generator, and
  with the process that runs it, however that ends.

  Args:
    function: called in another process; an exception that it raises is raised here.
    calls: arguments of each call, taken from the left; calls may be added while this runs.
    workers: number of processes; 0 runs the calls in this process.

  Raises:
    UserError: a worker process ended while it started.
  """
  while workers < 1 and calls:
    arguments = calls.popleft()
    yield arguments, function(*arguments)
  pool: dict[Connection, _Worker] = {}
  try:
    while calls or any(worker.arguments is not None for worker in pool.values()):
      busy = sum(worker.arguments is not None for worker in pool.values())
      while len(pool) < min(workers, busy + len(calls)):
        new_worker = _Worker.start()
        pool[new_worker.pipe] = new_worker
      readable = wait(list(pool), timeout=1)
      if not readable:
        yield None, None
      for worker in [pool[pipe] for pipe in pool if pipe in readable]:
        alive, finished, result = worker.receive()
        if not alive:
          del pool[worker.pipe]
        if finished is not None:
          yield finished, result
      for worker in pool.values():
        if worker.ready and worker.arguments is None and calls:
          worker.submit(function, calls.popleft())
  finally:
    for worker in pool.values():
      worker.process.kill()
      worker.process.join()
      worker.pipe.close()


@dataclasses.dataclass
class _Worker:
  """A worker process.

  Attributes:
    process: the process.
    pipe: the parent's end of the pipe to it.
    ready: True once the process has started.
    arguments: arguments of the call in progress; None while the worker is idle.
  """

  process: Any
  pipe: Connection
  ready: bool = False
  arguments: tuple | None = None

  @classmethod
  def start(cls) -> '_Worker':
    # Not fork: a lock that another thread holds at that moment would stay locked in the child.
    context = multiprocessing.get_context('spawn')
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end,), daemon=True)
    process.start()
    child_end.close()  # so that the parent's end reports EOF when the process ends
    return cls(process, parent_end)

  def submit(self, function: Callable[..., Any], arguments: tuple) -> None:
    self.arguments = arguments
    with contextlib.suppress(OSError):  # it died while idle: receive() reports that
      self.pipe.send((function, arguments))

  def receive(self) -> tuple[bool, tuple | None, Any]:
    """Returns (process is alive, arguments of the call that ended or None, its result)."""
    arguments, self.arguments = self.arguments, None
    try:
      error, result = self.pipe.recv()
    except (EOFError, OSError):
      self.process.join()
      self.pipe.close()
      if not self.ready:
        raise UserError(f'a worker process ended while it started (exit code {self.process.exitcode})') from None
      return False, arguments, CRASHED
    self.ready = True
    if error is not None:
      raise error
    return True, arguments, result


def _serve(pipe: Connection) -> None:
  """Receives calls and sends their results until the pipe closes; the first message says that the worker is ready."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
  end_with_parent()
  response: tuple[Exception | None, Any] = None, None
  while True:
    try:
      pipe.send(response)
      function, arguments = pipe.recv()
    except (EOFError, OSError):
      return
    try:
      response = None, function(*arguments)
    except Exception as error:
      error.add_note(traceback.format_exc())  # the parent does not have this traceback
      response = error, None


def end_with_parent() -> None:
  """Ends this process when its parent ends, even by SIGKILL."""
  parent = multiprocessing.parent_process()
  assert parent is not None

  def wait_for_parent() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait_for_parent, daemon=True).start()
