"""Several processes, a host each, as one run: how they find each other, and how the failure of one ends them all.

What one process must tell the others goes through the key-value store of jax's coordination service, which process 0
runs: it reaches a process whose main thread hangs in a collective, and needs no file system.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mevit_jax.errors import UserError

# Seconds. A process that is killed is missed after _HEARTBEAT; one that fails says so at once, and has _GRACE to finish
# what it was saving. One whose collective broke first waits _LOST to hear why from the process that it was broken by.
_ARRIVE, _HEARTBEAT, _LOST, _GRACE = 300, 30, 33, 25
_LAST = 600  # from the first process that is done to the last
_FOREVER = 2**31 * 1000

# What jax says where a collective broke, and another process may be why.
_BROKEN = re.compile(r'\b(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS): ')


def found(
  coordinator: str | None = None,
  processes: int | None = None,
  process_id: int | None = None,
  environ: Mapping[str, str] = os.environ,
) -> dict[str, Any] | None:
  """What `jax.distributed.initialize` needs here, from arguments and the environment; None where this process is alone.

  In this order: the arguments; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; the variables of a step
  of SLURM; a TPU, where jax itself asks GKE's variables or the machine's metadata. On any other machine nothing is
  asked and nothing waited for.

  Raises:
    UserError: some of the three are given and others not, or they do not fit together.
  """
  slurm = _slurm(environ)
  address = coordinator or environ.get('JAX_COORDINATOR_ADDRESS') or slurm.get('coordinator_address')
  count = _first(processes, environ.get('JAX_NUM_PROCESSES'), slurm.get('num_processes'))
  index = _first(process_id, environ.get('JAX_PROCESS_ID'), slurm.get('process_id'))
  if address is None and count is None and index is None:
    return {} if _on_tpu_pod(environ) else None
  if count == 1:
    return None
  if address is None or count is None or index is None:
    raise UserError(
      f'--coordinator is {address}, --processes {count}, --process_id {index}: give all three, or none '
      '(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)'
    )
  if not re.fullmatch(r'.+:\d+', address):
    raise UserError(f'--coordinator is {address!r}, and must be HOST:PORT of process 0')
  if not 0 <= index < count:
    raise UserError(f'--process_id is {index}, of {count} processes: they count from 0')
  return {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': index,
    'local_device_ids': slurm.get('local_device_ids'),
    'cluster_detection_method': 'deactivate',
  }


@contextlib.contextmanager
def initialize(
  coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
  """Joins the other processes of this run, if there are any, before jax looks for devices; leaves together with them.

  Only process 0 prints. An exception in one process ends all of them, by `os._exit(1)`: each says on stderr which one
  failed and why. One that was killed is missed after 30 s; then jax ends the others, and names it by its number.
  """
  arguments = found(coordinator, processes, process_id)
  if arguments is None:
    yield
    return
  global _member
  _member = _Member(arguments)
  try:
    with _member.quiet():
      yield
    _member.leave()
  except SystemExit:  # no failure: all of them leave
    _member.leave()
    raise
  except BaseException as error:
    _member.fail(error)
  finally:
    _member = None


@contextlib.contextmanager
def propagate_failure(but: type[BaseException] | tuple[type[BaseException], ...] = ()) -> Iterator[None]:
  """Tells the others of an exception here, if it is none of `but`, before it passes code that waits for them."""
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if _member is not None and not isinstance(error, but):
      _member.tell(error)
    raise


def is_main_process() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def allgather_bytes(value: bytes) -> list[bytes]:
  """The bytes of every process, by process; all must call it."""
  if jax.process_count() == 1:
    return [value]
  sizes = multihost_utils.process_allgather(np.int32(len(value)))  # processes
  # A power of two: what gathers is compiled for each size.
  padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
  padded[: len(value)] = np.frombuffer(value, np.uint8)
  rows = multihost_utils.process_allgather(padded)  # processes bytes
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


class _Member:
  """This process among the others of a run."""

  def __init__(self, arguments: dict[str, Any]):
    who = 'process {process_id} of {num_processes}'.format_map(arguments) if arguments else 'this process'
    where = arguments.get('coordinator_address', 'the address that this TPU names')
    alone = f'{who} did not meet the others at {where}'
    timer = _exit_after(_ARRIVE, f'error: {alone} within {_ARRIVE} s')  # jax would abort, with a stack trace
    try:
      jax.distributed.initialize(**arguments, initialization_timeout=2 * _ARRIVE, heartbeat_timeout_seconds=_HEARTBEAT)
    except Exception as error:  # of whatever kind: from sockets, a metadata server, jax
      raise UserError(f'{alone}: {_one_line(error)}') from error
    timer.cancel()
    from jax._src.distributed import global_state  # the store has no public name; Orbax takes it from here, too

    self._store: Any = global_state.client
    self._is_first = global_state.process_id == 0
    self._name = f'process {global_state.process_id} of {global_state.num_processes} on {socket.gethostname()}'
    self._told, self._is_why, self._fails = threading.Event(), False, False
    self._watcher = threading.Thread(target=self._watch, daemon=True)
    self._watcher.start()
    print(self._name, file=sys.stderr, flush=True)

  @contextlib.contextmanager
  def quiet(self) -> Iterator[None]:
    """Drops what is printed, but for errors, where this is not the first process."""
    if self._is_first:
      yield
      return
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
      yield

  def leave(self) -> None:
    """Waits for the others, who may still fail, and parts from them."""
    self._store.wait_at_barrier('mevit_jax/done', _LAST * 1000)
    jax.distributed.shutdown()
    self._watcher.join()  # a thread that is in C++ when Python ends aborts it

  def tell(self, error: BaseException) -> None:
    """Tells the others why this process fails; the code that the error passes then has some seconds."""
    if self._fails:
      return
    self._fails = True
    reason = _one_line(error)
    if _BROKEN.search(reason) and not self._told.is_set():
      print(f'{self._name} lost another one, and waits to hear why: {reason}', file=sys.stderr, flush=True)
      self._told.wait(_LOST)
    if not self._told.is_set():
      self._is_why = True
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or process 0 is no more
        self._store.key_value_set('mevit_jax/failed', f'{self._name} failed: {reason}')
    _exit_after(_GRACE, f'error: {self._name} did not finish what it was doing, and ends')

  def fail(self, error: BaseException) -> NoReturn:
    """Says what failed here, tells the others, and ends this process without waiting for them."""
    self.tell(error)
    reason = _one_line(error)
    if self._is_why or not _BROKEN.search(reason):
      if not isinstance(error, (UserError, KeyboardInterrupt)):
        traceback.print_exception(error)
      print(f'error: {self._name} failed: {reason}', file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.key_value_set('mevit_jax/gone', self._name, allow_overwrite=True)
    _exit()

  def _watch(self) -> None:
    """Ends this process when another one fails, wherever its main thread is; a thread's work."""
    try:
      reason = self._store.blocking_key_value_get('mevit_jax/failed', _FOREVER)
    except jax.errors.JaxRuntimeError:  # all is done, or process 0 is no more: then jax ends this process
      return
    if reason.startswith(self._name):
      return
    self._told.set()
    print(f'error: {reason}; so this one ends, {self._name}', file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.blocking_key_value_get('mevit_jax/gone', _GRACE * 1000)
    if not self._fails:  # then it is on its way out, and may be saving
      _exit()


_member: _Member | None = None


def _exit() -> NoReturn:
  time.sleep(1)  # process 0 takes with it what others have not read yet
  sys.stdout.flush()
  os._exit(1)


def _exit_after(seconds: float, message: str) -> threading.Timer:
  """Ends this process then, wherever its main thread is, unless it is cancelled."""

  def end() -> None:
    print(message, file=sys.stderr, flush=True)
    _exit()

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  return timer


def _one_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or ['']
  if isinstance(error, UserError):
    return lines[0]
  return f'{type(error).__name__}: {lines[0]}' if lines[0] else type(error).__name__


def _first(*values: int | str | None) -> int | None:
  """The first that is given, as a number."""
  given = next((value for value in values if value not in (None, '')), None)
  try:
    return None if given is None else int(given)
  except ValueError:
    raise UserError(f'JAX_NUM_PROCESSES and JAX_PROCESS_ID are numbers, not {given!r}') from None


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
  """What the variables of a step of SLURM (srun) say; nothing outside of one.

  jax's own reading of them gives a process one GPU, always; here it is all that it sees, unless it shares the machine
  with others of this step and SLURM has not dealt out the GPUs.
  """
  if not {'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_JOB_ID', 'SLURM_LOCALID'} <= environ.keys():
    return {}
  host = re.match(r'([^,\[]+)(?:\[([^],-]+))?', environ['SLURM_STEP_NODELIST'])  # n[07-09,11],m2 -> n07
  port = 61440 + int(environ['SLURM_JOB_ID']) % 4096
  shared = environ.get('SLURM_STEP_NUM_NODES', environ['SLURM_NTASKS']) != environ['SLURM_NTASKS']
  several_gpus = ',' in environ.get('CUDA_VISIBLE_DEVICES', ',')
  return {
    'coordinator_address': f'{"".join(part or "" for part in host.groups())}:{port}' if host else None,
    'num_processes': environ['SLURM_NTASKS'],
    'process_id': environ['SLURM_PROCID'],
    'local_device_ids': [int(environ['SLURM_LOCALID'])] if shared and several_gpus else None,
  }


def _has_tpu() -> bool:
  """Whether jax, when it was imported, saw the chips (and libtpu): it then puts them before the CPU."""
  return 'tpu' in (jax.config.values['jax_platforms'] or '')


def _on_tpu_pod(environ: Mapping[str, str]) -> bool:
  """Whether there are TPU chips here, and there may be other machines with them."""
  if not _has_tpu():
    return False
  workers = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')  # GKE
  if workers:
    return ',' in workers or int(environ.get('MEGASCALE_NUM_SLICES') or 1) > 1
  return 'TPU_SKIP_MDS_QUERY' not in environ
