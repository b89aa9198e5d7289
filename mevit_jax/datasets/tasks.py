"""Work on many videos, split into tasks of some hundred videos; each task is done once and leaves a manifest.

In a dataset's directory, `manifests/` holds one JSON file per finished task, and `in_progress/`, which exists while
tasks run, one small file per running task. All communication between processes and machines goes through these files,
so that nothing is lost when any of them stops.
"""

import contextlib
import faulthandler
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from mevit_jax.datasets import builders
from mevit_jax.datasets.processes import CRASHED, run_in_processes
from mevit_jax.datasets.reader import IN_PROGRESS
from mevit_jax.errors import UserError
from mevit_jax.files import atomic_path, read_checked_json, write_checked_json, write_json

MANIFESTS = 'manifests'
_STOP = 'stop'  # a file in in_progress/: running tasks stop when it exists

Row = dict[str, Any]  # a manifest's entry for a video: its example, with `bytes` in place of `video`
ProgressCallback = Callable[[int, int], None]  # (done, total)
# Arguments: reason of each unusable video by id, number of all videos. Raises a UserError if too many are unusable.
Check = Callable[[Mapping[str, str], int], None]
Heartbeats = Generator[None, None, None]  # yields at least once a second


@dataclass(frozen=True)
class Task:
  """A shard to write or, without class names, videos to examine.

  Attributes:
    name: name of the shard's file and of the manifest.
    items, make, unusable_example, encoding, time_limit: see `builders.VideoBuilder`.
    class_names: name of each label id.
  """

  name: str
  items: Sequence[Any]
  make: Callable[[Any], dict[str, Any]]
  unusable_example: Callable[[Any, str], dict[str, Any]]
  class_names: tuple[str, ...] | None = None
  encoding: Mapping[str, Any] | None = None
  time_limit: float = 0

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of everything that the task's result depends on."""
    content = self.class_names, *([self.encoding] if self.encoding else []), list(self.items)
    return hashlib.sha256(repr(content).encode()).hexdigest()


Executor = Callable[[Path, Sequence[Task]], Heartbeats]  # runs the tasks of a directory


def run(
  directory: Path,
  tasks: Sequence[Task],
  executor: Executor,
  progress: ProgressCallback = lambda done, total: None,
  check: Check = lambda unusable, total: None,
) -> None:
  """Runs the tasks that have no manifest yet.

  Args:
    directory: directory of the tasks' files.
    tasks: tasks in any order.
    executor: `run_local` for this machine, `beam.run` for others.
    progress: called from time to time with the numbers of finished and of all items.
    check: called with the unusable videos so far and the number of all items.

  Raises:
    UserError: `check` or a task raised it; finished tasks keep their manifests.
  """
  in_progress = directory / IN_PROGRESS
  for folder in (in_progress, directory / MANIFESTS):
    folder.mkdir(parents=True, exist_ok=True)
  for path in (*in_progress.iterdir(), *directory.glob('*.tmp'), *(directory / MANIFESTS).glob('*.tmp')):
    path.unlink()  # left by a run that was killed
  pending, total = {task.name: task for task in tasks}, sum(len(task.items) for task in tasks)
  done, unusable = 0, dict[str, str]()

  def collect(names: Sequence[str]) -> None:
    nonlocal done
    for name in names:
      if (manifest := read_manifest(directory, pending[name])) is not None:
        done += len(manifest['rows'])
        unusable.update({row['id']: row['unusable'] for row in manifest['rows'] if 'unusable' in row})
        del pending[name]
    progress(done + (_count_items_done(in_progress) if pending else 0), total)
    check(unusable, total)

  collect(list(pending))
  with contextlib.closing(executor(directory, list(pending.values()))) as heartbeats:
    for _ in heartbeats:
      if pending:  # otherwise the executor is only shutting down
        files = os.listdir(directory / MANIFESTS)
        collect([name for file in files if (name := file.removesuffix('.json')) in pending])
  if pending:
    collect(list(pending))
  if pending:
    raise UserError(f'{len(pending)} parts of {directory} are not finished; run the command again to continue')


def run_local(directory: Path, tasks: Sequence[Task], workers: int = 0) -> Heartbeats:
  """Runs tasks in worker processes of this machine, an `Executor`; a video that crashes its process becomes unusable.

  With 0 workers the tasks run in this process, which a crash then ends.
  """
  calls = deque((directory, task) for task in tasks)
  with contextlib.closing(run_in_processes(_run_task, calls, workers)) as results:
    for arguments, result in results:
      if arguments is not None and result == CRASHED:
        record_crash(*arguments)
        calls.appendleft(arguments)
      yield


def request_stop(directory: Path) -> None:
  """Makes running tasks stop after their current video, on all machines."""
  (directory / IN_PROGRESS / _STOP).touch()


def read_manifest(directory: Path, task: Task) -> dict[str, Any] | None:
  """Returns the `bytes` and `rows` of a finished task, or None if this task is not finished."""
  try:
    manifest = read_checked_json(directory / MANIFESTS / f'{task.name}.json')
    complete = task.class_names is None or manifest['bytes'] == (directory / task.name).stat().st_size
  except (FileNotFoundError, ValueError):
    return None
  return manifest if complete and manifest['digest'] == task.digest else None


def require_manifest(directory: Path, task: Task) -> dict[str, Any]:
  """Returns the manifest of a finished task; raises a UserError if it or the shard was deleted."""
  manifest = read_manifest(directory, task)
  if manifest is None:
    raise UserError(f'{directory / task.name} or its manifest was deleted; run the command again to continue')
  return manifest


def load_manifest(path: Path) -> dict[str, Any]:
  """Returns the `bytes` and `rows` of a finished task; raises a UserError if its manifest is missing or damaged."""
  try:
    return read_checked_json(path)
  except (FileNotFoundError, ValueError) as error:
    raise UserError(f'{path} was deleted or is damaged; run the command again to continue') from error


class _StoppedError(Exception):
  """Raised in a task when a stop was requested."""


def _run_task(directory: Path, task: Task) -> None:
  """Makes the examples of a task and writes its shard and manifest."""
  in_progress = directory / IN_PROGRESS
  try:
    if task.class_names is None:
      rows, size = _make_rows(in_progress, task, lambda example: None), 0
    else:
      path = directory / task.name
      with atomic_path(path) as temporary:
        shard = _ShardWriter(path, temporary, task.class_names)
        rows = _make_rows(in_progress, task, shard.write)
        shard.close()
      size = path.stat().st_size
  except _StoppedError:
    return
  manifest = {'digest': task.digest, 'bytes': size, 'rows': rows}
  write_checked_json(directory / MANIFESTS / f'{task.name}.json', manifest, indent=None)
  for suffix in ('current', 'crashes'):
    (in_progress / f'{task.name}.{suffix}').unlink(missing_ok=True)


def _make_rows(in_progress: Path, task: Task, write: Callable[[Mapping[str, Any]], None]) -> list[Row]:
  """Makes and writes every example of a task, and records which one is current in case the process crashes."""
  crashes = _read_crashes(in_progress, task)
  rows = []
  with (in_progress / f'{task.name}.current').open('wb', buffering=0) as current:
    for i, item in enumerate(task.items):
      if (in_progress / _STOP).exists():
        raise _StoppedError
      os.pwrite(current.fileno(), f'{i:9} {time.monotonic():20.3f}'.encode(), 0)
      with _hard_time_limit(task.time_limit):
        example = task.unusable_example(item, crashes[i]) if i in crashes else task.make(item)
      rows.append(_example_row(example))
      if 'unusable' not in example:
        write(example)
  return rows


def _example_row(example: Mapping[str, Any]) -> Row:
  row = {key: value for key, value in example.items() if key != 'video'}
  if 'unusable' in row:
    return row
  return {'sha256': hashlib.sha256(example['video']).hexdigest(), **row, 'bytes': len(example['video'])}


class _ShardWriter:
  """Writes examples to an array_record file.

  Args:
    path: final path of the shard, for error messages.
    temporary: path that is written.
    class_names: name of each label id.
  """

  def __init__(self, path: Path, temporary: Path, class_names: Sequence[str]):
    self._path, self._features = path, builders.features(class_names)
    self._serializer = ExampleSerializer(self._features.get_serialized_info())
    with self._user_errors():
      self._writer = ArrayRecordWriter(str(temporary), 'group_size:1')

  def write(self, example: Mapping[str, Any]) -> None:
    fields = {**{key: example[key] for key in self._features}, 'label': example['label'] or -1}  # '': no label
    message = self._serializer.get_tf_example(self._features.encode_example(fields))
    with self._user_errors():
      self._writer.write(message.SerializeToString(deterministic=True))

  def close(self) -> None:
    with self._user_errors():
      self._writer.close()

  @contextlib.contextmanager
  def _user_errors(self) -> Iterator[None]:
    try:
      yield
    except RuntimeError as error:  # the only exception of the writer, for a full disk too
      raise UserError(f'{self._path} cannot be written: {str(error).split(";")[0]}') from error


@contextlib.contextmanager
def _hard_time_limit(seconds: float) -> Iterator[None]:
  """Ends this worker process if the body takes longer: a decoder that hangs cannot be interrupted otherwise."""
  if not seconds or multiprocessing.parent_process() is None:
    yield
    return
  with open(os.devnull, 'w') as devnull:
    faulthandler.dump_traceback_later(seconds, exit=True, file=devnull)
    try:
      yield
    finally:
      faulthandler.cancel_dump_traceback_later()


def record_crash(directory: Path, task: Task) -> None:
  """Records which item crashed its process, for the process that runs the task next.

  Raises:
    UserError: the process did not crash on an item, or on one that had crashed already.
  """
  in_progress = directory / IN_PROGRESS
  crashes = _read_crashes(in_progress, task)
  try:
    item, started = (in_progress / f'{task.name}.current').read_text().split()
  except (OSError, ValueError):
    item = started = '-1'
  if int(item) < 0 or int(item) in crashes:
    raise UserError(
      f'a process that wrote {directory / task.name} died, possibly because memory ran out; run the command again to'
      ' continue, with fewer --workers to use less memory'
    )
  hung = 0 < task.time_limit <= time.monotonic() - float(started)
  reason = 'the decoder hangs' if hung else 'the decoder crashed, or ran out of memory'
  write_json(in_progress / f'{task.name}.crashes', {**crashes, int(item): reason}, indent=None)


def _read_crashes(in_progress: Path, task: Task) -> dict[int, str]:
  """Returns the items that crashed their process, by index, with the reason."""
  path = in_progress / f'{task.name}.crashes'
  return {int(i): reason for i, reason in json.loads(path.read_text()).items()} if path.exists() else {}


def _count_items_done(in_progress: Path) -> int:
  """Returns the number of items that the running tasks have finished."""
  count = 0
  for path in in_progress.glob('*.current'):
    with contextlib.suppress(OSError, ValueError, IndexError):  # the task has just ended or just started
      count += int(path.read_text().split()[0])
  return count
