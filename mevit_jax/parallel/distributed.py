"""Multi-process runs: cluster detection, initialization, and propagation of one process's failure to all others.

Failure messages travel through the key-value store of jax's coordination service, which process 0 runs: they reach a
process whose main thread is blocked in a collective, and need no file system.
"""

import contextlib
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mevit_jax.errors import UserError

# Seconds. A killed process is detected after _HEARTBEAT_TIMEOUT. A process that fails reports it at once, and has
# _SHUTDOWN_GRACE to finish a checkpoint. A process whose collective broke waits _REASON_TIMEOUT for the report of the
# process that caused it.
_CONNECT_TIMEOUT = 300
_HEARTBEAT_TIMEOUT = 30
_REASON_TIMEOUT = 33
_SHUTDOWN_GRACE = 25
_EXIT_BARRIER_TIMEOUT = 600  # between the first process to finish and the last
_NO_TIMEOUT_MS = 2**31 * 1000

# Status codes of errors from broken collectives, which may have their cause in another process.
_COLLECTIVE_ERROR = re.compile(r'\b(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS): ')

# Variables that srun sets in every process of a job step; sbatch alone does not set all of them.
_SLURM_STEP = {'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_JOB_ID', 'SLURM_LOCALID'}


def detect_cluster(
  coordinator: str | None = None,
  processes: int | None = None,
  process_id: int | None = None,
  environ: Mapping[str, str] = os.environ,
) -> dict[str, Any] | None:
  """Returns the arguments of `jax.distributed.initialize` for this process, or None if it is the only process.

  Checked in this order: the arguments; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a SLURM job step,
  whose coordinator address jax derives from the node list; a TPU slice, where jax reads the variables of GKE or the
  metadata server. On any other machine nothing is queried and nothing is waited for.

  Raises:
    UserError: only some of the three values are known, or they contradict each other.
  """
  in_slurm = environ.keys() >= _SLURM_STEP
  slurm: Mapping[str, str] = environ if in_slurm else {}
  address = coordinator or environ.get('JAX_COORDINATOR_ADDRESS')
  count = _first_int(processes, environ.get('JAX_NUM_PROCESSES'), slurm.get('SLURM_NTASKS'))
  index = _first_int(process_id, environ.get('JAX_PROCESS_ID'), slurm.get('SLURM_PROCID'))
  if address is None and count is None and index is None:
    return {} if _on_tpu_slice(environ) else None
  if count == 1:
    return None
  if (address is None and not in_slurm) or count is None or index is None:
    raise UserError(
      f'--coordinator is {address}, --processes {count}, --process_id {index}: set all three or none of them '
      '(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)'
    )
  if address is not None and not re.fullmatch(r'.+:\d+', address):
    raise UserError(f'--coordinator {address!r} is not an address: use HOST:PORT of process 0')
  if not 0 <= index < count:
    raise UserError(f'--process_id {index} is out of range for {count} processes: use 0 to {count - 1}')
  return {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': index,
    'local_device_ids': _slurm_local_device_ids(environ) if in_slurm else None,
    'cluster_detection_method': 'slurm' if in_slurm else 'deactivate',
  }


@contextlib.contextmanager
def initialize(
  coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
  """Connects to the other processes of the run, if there are any, before jax initializes its devices.

  Only process 0 prints. An exception in one process ends all of them with exit status 1; each prints to stderr which
  process failed and why. A killed process is detected after 30 s; jax then ends the others and prints its index.
  """
  arguments = detect_cluster(coordinator, processes, process_id)
  if arguments is None:
    yield
    return
  global _current
  _current = _Process(arguments)
  try:
    with _current.silenced():
      yield
    _current.shutdown()
  except SystemExit:  # not a failure: all processes exit
    _current.shutdown()
    raise
  except BaseException as error:
    _current.fail(error)
  finally:
    _current = None


@contextlib.contextmanager
def propagate_failure(but: type[BaseException] | tuple[type[BaseException], ...] = ()) -> Iterator[None]:
  """Reports an exception to the other processes before it unwinds through code that waits for them.

  Args:
    but: exception types that are raised in all processes, and are not reported.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if _current is not None and not isinstance(error, but):
      _current.report(error)
    raise


def is_main_process() -> bool:
  """Returns True in the process that writes the files that are written once."""
  return jax.process_index() == 0


def allgather_bytes(value: bytes) -> list[bytes]:
  """Returns the bytes of every process, ordered by process index; all processes must call it."""
  if jax.process_count() == 1:
    return [value]
  sizes = multihost_utils.process_allgather(np.int32(len(value)))  # processes
  # Padded to a power of two: the gather is compiled once per size.
  padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
  padded[: len(value)] = np.frombuffer(value, np.uint8)
  gathered = multihost_utils.process_allgather(padded)  # processes bytes
  return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)]


class _Process:
  """This process of a multi-process run."""

  def __init__(self, arguments: dict[str, Any]):
    from jax._src.distributed import global_state  # has no public name; Orbax uses it too

    process = 'process {process_id} of {num_processes}'.format_map(arguments) if arguments else 'this process'

    def message() -> str:
      return (
        f'{process} could not connect to the coordinator at {global_state.coordinator_address or "unknown address"}'
      )

    # jax's own timeout would abort with a stack trace.
    timer = _exit_after(_CONNECT_TIMEOUT, lambda: f'error: {message()} within {_CONNECT_TIMEOUT} s')
    try:
      jax.distributed.initialize(
        **arguments, initialization_timeout=2 * _CONNECT_TIMEOUT, heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT
      )
    except Exception as error:  # any type: sockets, metadata server, jax
      raise UserError(f'{message()}: {_first_line(error)}') from error
    timer.cancel()

    self._store: Any = global_state.client
    self._is_main = global_state.process_id == 0
    self._name = f'process {global_state.process_id} of {global_state.num_processes} on {socket.gethostname()}'
    self._reason_received = threading.Event()
    self._is_cause = self._failing = False
    self._watcher = threading.Thread(target=self._watch, daemon=True)
    self._watcher.start()
    _print_error(self._name)

  @contextlib.contextmanager
  def silenced(self) -> Iterator[None]:
    """Discards stdout and logging.info in all processes but process 0."""
    if self._is_main:
      yield
      return
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.INFO))
    try:
      with open(os.devnull, 'w') as devnull, contextlib.redirect_stdout(devnull):
        yield
    finally:
      logging.disable(disabled)

  def shutdown(self) -> None:
    """Waits until all processes have finished, any of which may still fail, and disconnects."""
    self._store.wait_at_barrier('mevit_jax/done', _EXIT_BARRIER_TIMEOUT * 1000)
    jax.distributed.shutdown()
    self._watcher.join()  # a thread in C++ code at interpreter exit would abort the process

  def report(self, error: BaseException) -> None:
    """Reports the failure of this process to the others; this process then has _SHUTDOWN_GRACE seconds to exit."""
    if self._failing:
      return
    self._failing = True
    reason = _first_line(error)
    if _COLLECTIVE_ERROR.search(reason) and not self._reason_received.is_set():
      _print_error(f'{self._name} lost another process, waiting for its failure message: {reason}')
      self._reason_received.wait(_REASON_TIMEOUT)
    if not self._reason_received.is_set():
      self._is_cause = True
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first, or process 0 is gone
        self._store.key_value_set('mevit_jax/failed', f'{self._name} failed: {reason}')
    _exit_after(_SHUTDOWN_GRACE, lambda: f'error: {self._name} did not shut down within {_SHUTDOWN_GRACE} s, exiting')

  def fail(self, error: BaseException) -> NoReturn:
    """Reports an exception, prints it, and ends this process without waiting for the others."""
    self.report(error)
    reason = _first_line(error)
    if self._is_cause or not _COLLECTIVE_ERROR.search(reason):
      if not isinstance(error, (UserError, KeyboardInterrupt)):
        traceback.print_exception(error)
      _print_error(f'error: {self._name} failed: {reason}')
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.key_value_set('mevit_jax/exited', self._name, allow_overwrite=True)
    _exit()

  def _watch(self) -> None:
    """Ends this process when another one fails, whatever its main thread is doing; runs in a thread."""
    try:
      reason = self._store.blocking_key_value_get('mevit_jax/failed', _NO_TIMEOUT_MS)
    except jax.errors.JaxRuntimeError:  # shut down, or process 0 is gone, and jax ends this process
      return
    if reason.startswith(self._name):
      return
    self._reason_received.set()
    _print_error(f'error: {reason}; exiting {self._name}')
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.blocking_key_value_get('mevit_jax/exited', _SHUTDOWN_GRACE * 1000)
    if not self._failing:  # else the main thread is exiting, and may be saving a checkpoint
      _exit()


_current: _Process | None = None


def _print_error(message: str) -> None:
  """Prints to stderr in every process, whatever is silenced."""
  print(message, file=sys.stderr, flush=True)


def _exit() -> NoReturn:
  time.sleep(1)  # when process 0 exits, values that others have not read yet are lost
  sys.stdout.flush()
  os._exit(1)


def _exit_after(seconds: float, message: Callable[[], str]) -> threading.Timer:
  """Ends this process after a timeout, whatever its main thread is doing, unless the timer is canceled."""

  def end() -> None:
    _print_error(message())
    _exit()

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  return timer


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or ['']
  if isinstance(error, UserError):
    return lines[0]
  return f'{type(error).__name__}: {lines[0]}' if lines[0] else type(error).__name__


def _first_int(*values: int | str | None) -> int | None:
  """Returns the first value that is set, as an integer."""
  value = next((value for value in values if value not in (None, '')), None)
  try:
    return None if value is None else int(value)
  except ValueError:
    raise UserError(f'JAX_NUM_PROCESSES and JAX_PROCESS_ID must be integers, not {value!r}') from None


def _slurm_local_device_ids(environ: Mapping[str, str]) -> list[int] | None:
  """Returns the GPUs of this process of a SLURM job step; an empty list is all visible GPUs.

  jax assigns the one GPU with index SLURM_LOCALID. That holds here only where several processes of the step share a
  node and SLURM has not assigned GPUs to them. None leaves the choice to jax, which then reads JAX_LOCAL_DEVICE_IDS.
  """
  if environ.get('JAX_LOCAL_DEVICE_IDS'):
    return None
  tasks = environ['SLURM_NTASKS']
  shares_node = environ.get('SLURM_STEP_NUM_NODES', tasks) != tasks
  sees_several_gpus = ',' in environ.get('CUDA_VISIBLE_DEVICES', ',')
  return [int(environ['SLURM_LOCALID'])] if shares_node and sees_several_gpus else []


def _has_tpu() -> bool:
  """Returns True if jax detected TPU chips and libtpu at import: it then lists the platform before the CPU."""
  return 'tpu' in (jax.config.values['jax_platforms'] or '')


def _on_tpu_slice(environ: Mapping[str, str]) -> bool:
  """Returns True if this machine has TPU chips and may be one of several hosts."""
  if not _has_tpu():
    return False
  workers = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')  # GKE
  if workers:
    return ',' in workers or int(environ.get('MEGASCALE_NUM_SLICES') or 1) > 1
  return 'TPU_SKIP_MDS_QUERY' not in environ
