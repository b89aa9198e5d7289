"""Work on many videos, in tasks of some hundred: each leaves a receipt, and is done once.

In a directory, `receipts/` holds what the tasks that are done found, and `unfinished/`, which is
there while they run, what each of the others is at. Whoever runs them, on whatever machines, all is
said through these files; so nothing has to be carried back, and nothing is lost when it stops.
"""

import contextlib
import faulthandler
import functools
import hashlib
import json
import multiprocessing
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from mevit_jax.datasets import builders
from mevit_jax.datasets.processes import DIED, in_processes
from mevit_jax.datasets.reader import UNFINISHED
from mevit_jax.errors import UserError

RECEIPTS = 'receipts'
_STOP = 'stop'  # a file in unfinished/: whoever is at a task leaves it
Row = dict[str, Any]  # what a receipt says of a video: its example, with `bytes` for `video`


@dataclass(frozen=True)
class Task:
  """A shard to be written, or, without class names, items to be looked at.

  Attributes:
    name: of the shard's file and of the receipt.
    items, make, dead, encoding, time_limit: as `builders.VideoBuilder` says.
    class_names: label i is the i-th name.
  """

  name: str
  items: Sequence[Any]
  make: Callable[[Any], dict[str, Any]]
  dead: Callable[[Any, str], dict[str, Any]]
  class_names: tuple[str, ...] | None = None
  encoding: Mapping[str, Any] | None = None
  time_limit: float = 0

  @functools.cached_property
  def key(self) -> str:
    """Another one, another shard."""
    content = self.class_names, *([self.encoding] if self.encoding else []), list(self.items)
    return hashlib.sha256(repr(content).encode()).hexdigest()


Progress = Callable[[int, int], None]  # (done, total)
Check = Callable[[Mapping[str, str], int], None]  # (why each of the dead is, by id, total): raises where they are many
Ticks = Generator[None, None, None]  # at least one a second
Engine = Callable[[Path, Sequence[Task]], Ticks]  # does the tasks in a directory


def run(
  directory: Path,
  tasks: Sequence[Task],
  engine: Engine,
  progress: Progress = lambda done, total: None,
  check: Check = lambda dead, total: None,
) -> None:
  """Does the tasks that have no receipt yet.

  Args:
    directory: of the tasks' files.
    tasks: in any order.
    engine: how: `supervise` on this machine, `beam.run` on others.
    progress: called with how many items are done, and of how many, now and then.
    check: called with what is dead, and how many items there are at all.

  Raises:
    UserError: whatever `check` and a task raise; the receipts stay.
  """
  notes = directory / UNFINISHED
  for folder in (notes, directory / RECEIPTS):
    folder.mkdir(parents=True, exist_ok=True)
  for path in (*notes.iterdir(), *directory.glob('*.tmp')):
    path.unlink()  # a killed run's
  left, total = {task.name: task for task in tasks}, sum(len(task.items) for task in tasks)
  done, dead = 0, dict[str, str]()

  def collect(names: Sequence[str]) -> None:
    nonlocal done
    for name in names:
      if (receipt := read_receipt(directory, left[name])) is not None:
        done += len(receipt['rows'])
        dead.update({row['id']: row['dead'] for row in receipt['rows'] if 'dead' in row})
        del left[name]
    progress(done + (_at_work(notes) if left else 0), total)
    check(dead, total)

  collect(list(left))
  with contextlib.closing(engine(directory, list(left.values()))) as ticks:
    for _ in ticks:
      if left:  # else an engine is only winding up
        there = os.listdir(directory / RECEIPTS)
        collect([name for file in there if (name := file.removesuffix('.json')) in left])
  if left:
    collect(list(left))
  if left:
    raise UserError(f'{len(left)} parts of {directory} are not done: run the command again to go on')


def supervise(directory: Path, tasks: Sequence[Task], workers: int = 0) -> Ticks:
  """Does tasks in processes of this machine: an `Engine`. What takes a process down is dead, and no more.

  With 0 workers, in this process, of which it is then a part.
  """
  calls = deque((directory, task) for task in tasks)
  with contextlib.closing(in_processes(_do, calls, workers)) as results:
    for arguments, result in results:
      if arguments is not None and result == DIED:
        _blame(*arguments)
        calls.appendleft(arguments)
      yield


def stop(directory: Path) -> None:
  """Makes all that are at a task leave it, wherever they run."""
  (directory / UNFINISHED / _STOP).touch()


def read_receipt(directory: Path, task: Task) -> dict[str, Any] | None:
  """The receipt of a task that was done, by this run or another: its `bytes` and `rows`."""
  try:
    receipt = json.loads((directory / RECEIPTS / f'{task.name}.json').read_text())
    whole = task.class_names is None or receipt['bytes'] == (directory / task.name).stat().st_size
  except (FileNotFoundError, ValueError):
    return None
  return receipt if whole and receipt['key'] == task.key else None


def receipt_of(directory: Path, task: Task) -> dict[str, Any]:
  """The receipt of a task that is done."""
  receipt = read_receipt(directory, task)
  if receipt is None:
    raise UserError(f'{directory / task.name} or its receipt is gone: run the command again to go on')
  return receipt


def _do(directory: Path, task: Task) -> None:
  """Makes a task's items, and its shard and receipt."""
  notes = directory / UNFINISHED
  crashed = _crashed(notes, task)
  shard = _Shard(directory / task.name, task.class_names) if task.class_names is not None else None
  rows = []
  try:
    with (notes / f'{task.name}.doing').open('wb', buffering=0) as doing:
      for i, item in enumerate(task.items):
        if (notes / _STOP).exists():
          return
        os.pwrite(doing.fileno(), f'{i:9} {time.monotonic():20.3f}'.encode(), 0)
        with _ended_after(task.time_limit):
          example = task.dead(item, crashed[i]) if i in crashed else task.make(item)
        rows.append(_row(example))
        if shard and 'dead' not in example:
          shard.write(example)
    size = shard.close() if shard else 0
  finally:
    if shard:
      shard.partial.unlink(missing_ok=True)
  _save({'key': task.key, 'bytes': size, 'rows': rows}, directory / RECEIPTS / f'{task.name}.json')
  for suffix in ('doing', 'crashed'):
    (notes / f'{task.name}.{suffix}').unlink(missing_ok=True)


def _row(example: Mapping[str, Any]) -> Row:
  row = {key: value for key, value in example.items() if key != 'video'}
  if 'dead' in row:
    return row
  return {'sha256': hashlib.sha256(example['video']).hexdigest(), **row, 'bytes': len(example['video'])}


class _Shard:
  """A file of examples, which is at its path when it is whole."""

  def __init__(self, path: Path, class_names: Sequence[str]):
    self._path, self._features = path, builders.features(class_names)
    self._serializer = ExampleSerializer(self._features.get_serialized_info())
    # Of its own: a process that lost touch with the rest may still be at the same shard.
    self.partial = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
    with self._named():
      self._writer = ArrayRecordWriter(str(self.partial), 'group_size:1')

  def write(self, example: Mapping[str, Any]) -> None:
    known = {**{key: example[key] for key in self._features}, 'label': example['label'] or -1}  # '': no label
    message = self._serializer.get_tf_example(self._features.encode_example(known))
    with self._named():
      self._writer.write(message.SerializeToString(deterministic=True))

  def close(self) -> int:
    """Returns the file's size."""
    with self._named():
      self._writer.close()
    self.partial.replace(self._path)
    return self._path.stat().st_size

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    try:
      yield
    except RuntimeError as error:  # the writer's only kind; a full disk is one
      raise UserError(f'{self._path} cannot be written: {str(error).split(";")[0]}') from error


def _save(content: Any, path: Path) -> None:
  partial = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
  partial.write_text(json.dumps(content))
  partial.replace(path)


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
  """Ends this process if its body takes longer: a decoder that hangs listens to nothing else."""
  if not seconds or multiprocessing.parent_process() is None:
    yield
    return
  with open(os.devnull, 'w') as nowhere:
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    try:
      yield
    finally:
      faulthandler.cancel_dump_traceback_later()


def _blame(directory: Path, task: Task) -> None:
  """Notes which item took its process down, for the next process that is at the task."""
  notes = directory / UNFINISHED
  crashed = _crashed(notes, task)
  try:
    item, began = (notes / f'{task.name}.doing').read_text().split()
  except (OSError, ValueError):
    item = began = '-1'
  if int(item) < 0 or int(item) in crashed:
    raise UserError(
      f'a process that wrote {directory / task.name} died, perhaps of too little memory: run the command again'
      ' to go on (fewer --workers need less)'
    )
  hung = 0 < task.time_limit <= time.monotonic() - float(began)
  reason = 'the decoder hangs' if hung else 'the decoder crashed, or ran out of memory'
  _save({**crashed, int(item): reason}, notes / f'{task.name}.crashed')


def _crashed(notes: Path, task: Task) -> dict[int, str]:
  """Which items took their process down, and how."""
  path = notes / f'{task.name}.crashed'
  return {int(i): reason for i, reason in json.loads(path.read_text()).items()} if path.exists() else {}


def _at_work(notes: Path) -> int:
  """How many items the tasks that are being done have behind them."""
  count = 0
  for path in notes.glob('*.doing'):
    with contextlib.suppress(OSError, ValueError, IndexError):  # it is done, or has just begun and says nothing yet
      count += int(path.read_text().split()[0])
  return count
