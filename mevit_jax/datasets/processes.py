"""Calls in processes of their own: one that takes its process down costs nothing but itself."""

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

DIED = 'died'  # in place of a result: the process ended in the middle of the call


def in_processes(
  function: Callable[..., Any], calls: deque[tuple], workers: int
) -> Generator[tuple[tuple, Any] | tuple[None, None], None, None]:
  """Yields (arguments, result) as they come, and (None, None) at least every second.

  Args:
    function: called in another process; what it raises is raised here.
    calls: the arguments of each call, taken from the left; more may be put in while this runs.
    workers: how many processes; 0: this one.

  A process that dies is replaced, and its call's result is DIED. All of them end with this
  generator, and with its process, in whatever way that ends.
  """
  while workers < 1 and calls:
    call = calls.popleft()
    yield call, function(*call)
  crew: dict[Connection, _Worker] = {}
  try:
    while calls or any(worker.call is not None for worker in crew.values()):
      busy = sum(worker.call is not None for worker in crew.values())
      while len(crew) < min(workers, busy + len(calls)):
        started = _Worker.start()
        crew[started.pipe] = started
      heard = wait(list(crew), timeout=1)
      if not heard:
        yield None, None
      for worker in [crew[pipe] for pipe in crew if pipe in heard]:
        alive, arguments, result = worker.receive()
        if not alive:
          del crew[worker.pipe]
        if arguments is not None:
          yield arguments, result
      for worker in crew.values():
        if worker.ready and worker.call is None and calls:
          worker.hand(function, calls.popleft())
  finally:
    for worker in crew.values():
      worker.process.kill()
      worker.process.join()
      worker.pipe.close()


@dataclasses.dataclass
class _Worker:
  """A process, our end of the pipe to it, and the arguments of the call that it is busy with."""

  process: Any
  pipe: Connection
  ready: bool = False
  call: tuple | None = None

  @classmethod
  def start(cls) -> '_Worker':
    # Not fork: a lock that another thread holds at that moment would stay shut in the child.
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that ours ends when the process does
    return cls(process, ours)

  def hand(self, function: Callable[..., Any], arguments: tuple) -> None:
    self.call = arguments
    with contextlib.suppress(OSError):  # it died while it had nothing to do: that is what is received next
      self.pipe.send((function, arguments))

  def receive(self) -> tuple[bool, tuple | None, Any]:
    """Whether it is alive, the arguments of the call that ended, if one did, and its result."""
    arguments, self.call = self.call, None
    try:
      error, result = self.pipe.recv()
    except (EOFError, OSError):
      self.process.join()
      self.pipe.close()
      if not self.ready:
        raise UserError(f'a worker process ended as it started (exit code {self.process.exitcode})') from None
      return False, arguments, DIED
    self.ready = True
    if error is not None:
      raise error
    return True, arguments, result


def _serve(pipe: Connection) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
  end_with_parent()
  answer: tuple[Exception | None, Any] = None, None  # ready
  while True:
    try:
      pipe.send(answer)
      function, arguments = pipe.recv()
    except (EOFError, OSError):
      return
    try:
      answer = None, function(*arguments)
    except Exception as error:
      error.add_note(traceback.format_exc())  # of which only this process knows
      answer = error, None


def end_with_parent() -> None:
  """Ends this process when its parent is gone: one that was killed can tell nobody to end."""
  parent = multiprocessing.parent_process()
  assert parent is not None

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
