"""Videos that lie in files: each opened and decoded once on its way into a dataset."""

import dataclasses
import errno
import functools
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets.builders import VideoBuilder
from mevit_jax.datasets.shards import group
from mevit_jax.datasets.tasks import Check, Engine, Progress, Row, Task, receipt_of, run
from mevit_jax.errors import UserError
from mevit_jax.video.container import VideoError
from mevit_jax.video.transcode import Encoding, reencode

MAX_BYTES = 256 * 2**20  # of a video; an example's encoding ends at 2 GiB
SHARDS = 64  # at least, where they do not become smaller than this: so many processes can share the work
SHARD_BYTES = 8 * 2**20, 256 * 2**20

SPLITS = 'train', 'validation', 'test'
KEEP = Encoding('keep')
EXAMINED_AT_ONCE = 32  # videos; what is lost when it is killed


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
  """A video as a dataset's lists or folders name it.

  Attributes:
    id: names the video in its dataset, the same on every machine; of its own in the whole dataset.
    path: its file; '' or one that is not there: it is counted as missing.
    label: a class name; '' where the split has no labels.
    split: train, validation or test; '' where none was given.
  """

  id: str
  path: str
  label: str
  split: str


@dataclasses.dataclass(frozen=True)
class Listing:
  """What a dataset's own lists, or its folders, say there is.

  Attributes:
    found: every video listed, whether its file is there or not; either all have a split or none.
    class_names: label i is the i-th name; it may hold classes that no video here has.
    notes: what else there is to say of it, a line each.
  """

  found: Sequence[Found]
  class_names: tuple[str, ...]
  notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
  """A file: all that an example depends on, so that it is known when it changes.

  Attributes:
    bytes, changed: its size, and when it was changed, in nanoseconds.
    examined: the row of an examination before; None where there was none.
  """

  found: Found
  bytes: int
  changed: int
  examined: Mapping[str, Any] | None = None


class FilesBuilder(VideoBuilder):
  """Videos from files."""

  def __init__(
    self,
    data_dir: str | Path,
    name: str,
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[Item]],
    encoding: Encoding,
    time_limit: float = 0,
  ):
    everything = sum(item.bytes for items in splits.values() for item in items)
    smallest, largest = SHARD_BYTES
    limit = min(max(everything // SHARDS, smallest), largest)
    shards = {split: group(items, lambda item: item.bytes, limit) for split, items in splits.items()}
    self.make = functools.partial(make, encoding=encoding, time_limit=time_limit)
    self.encoding = described(encoding)
    self.dead = dead
    self.time_limit = hard_limit(time_limit)
    super().__init__(data_dir, name, class_names, shards)


def by_split(items: Sequence[Item]) -> dict[str, list[Item]]:
  """Items by the split that was given, in the order in which they were listed; train comes first."""
  rows: dict[str, list[Item]] = {name: [] for name in SPLITS}
  for item in items:
    rows[item.found.split].append(item)
  return {name: each for name, each in rows.items() if each}


def on_disk(listing: Listing) -> tuple[list[Item], list[Found]]:
  """The videos whose files are there, and those whose are not; opens none.

  Raises:
    UserError: an id is there twice, a label is not one of the classes, or no file is there.
  """
  seen: dict[str, str] = {}
  items, missing, classes = [], [], {*listing.class_names, ''}
  for found in listing.found:
    if found.id in seen:
      raise UserError(f'two videos have the id {found.id!r}: {seen[found.id]} and {found.path}')
    if found.label not in classes:
      raise UserError(f'{found.id} is of class {found.label!r}, which is not in the list of classes')
    seen[found.id] = found.path
    size, changed = _stat(found.path)
    if changed is None:
      missing.append(found)
    else:
      items.append(Item(found, size, changed))
  if not items:
    where = next((each.path for each in missing if each.path), '')
    raise UserError(f'none of the {len(missing)} videos listed is there{where and f" (for one: {where})"}')
  return items, missing


def examine(
  items: Sequence[Item],
  directory: Path,
  engine: Engine,
  progress: Progress = lambda done, total: None,
  check: Check = lambda dead, total: None,
  encoding: Encoding = KEEP,
  time_limit: float = 0,
) -> dict[str, Row]:
  """Makes every video an example and returns its row, by id; what a killed run found is taken from `directory`.

  Args:
    items: in any order.
    directory: of notes, the caller's to remove.
    engine, progress, check: as `tasks.run` says.
    encoding, time_limit: as `make` says.
  """
  work = functools.partial(make, encoding=encoding, time_limit=time_limit)
  plan = []
  # By class: where one changes, the others' tasks are as they were.
  for _, each in itertools.groupby(sorted(items, key=lambda i: (i.found.label, i.found.id)), lambda i: i.found.label):
    for part in group(list(each), lambda item: 1, EXAMINED_AT_ONCE):
      about = described(encoding)
      task = Task('', part, work, dead, encoding=about, time_limit=hard_limit(time_limit))
      plan.append(dataclasses.replace(task, name=task.key))
  run(directory, plan, engine, progress, check)
  return {row['id']: row for task in plan for row in receipt_of(directory, task)['rows']}


def _stat(path: str) -> tuple[int, int | None]:
  """A file's size, and when it was changed: None if it is not there."""
  try:
    stat = os.stat(path)
  except OSError as error:
    # What may not be looked at is there: it is opened, and dead.
    return 0, None if error.errno in (errno.ENOENT, errno.ENOTDIR) else 0
  return stat.st_size, stat.st_mtime_ns


def make(item: Item, encoding: Encoding, time_limit: float = 0) -> dict[str, Any]:
  """Reads and decodes one file, every frame, if that was not done before; what is dead says why.

  Args:
    item: the file.
    encoding: how to store it.
    time_limit: seconds to decode it in; 0: as long as it takes.

  Raises:
    UserError: it is not what was listed or examined.
  """
  if item.bytes > MAX_BYTES:
    return dead(item, f'{item.bytes / 2**20:.0f} MiB, more than {MAX_BYTES / 2**20:.0f}: cut it into clips')
  try:
    data = Path(item.found.path).read_bytes()
  except (OSError, MemoryError) as error:
    return dead(item, _reason(error))
  digest, before = hashlib.sha256(data).hexdigest(), item.examined
  if _stat(item.found.path) != (item.bytes, item.changed) or (before and before['sha256'] != digest):
    raise UserError(f'{item.found.path} changed while it was prepared: run the command again to go on')
  try:
    if before and encoding.kind == 'keep':
      known, damage = before, before['damage']
    else:
      data, source, stored = reencode(data, encoding, time_limit or None)
      known, damage = dataclasses.asdict(stored), source.damage
  except Exception as error:  # of whatever kind: no video may stop the others
    return dead(item, _reason(error))
  known = {field: known[field] for field in ('num_frames', 'fps', 'duration', 'height', 'width')}
  return {'video': data, 'label': item.found.label, 'id': item.found.id, 'sha256': digest, **known, 'damage': damage}


def _reason(error: Exception) -> str:
  said = getattr(error, 'strerror', None) or str(error)
  said = ' '.join(said.split())
  return said if isinstance(error, (VideoError, OSError)) and said else f'{type(error).__name__} {said}'.strip()


def dead(item: Item, reason: str) -> dict[str, Any]:
  """What stands for a video of which nothing can be used."""
  return {'label': item.found.label, 'id': item.found.id, 'dead': reason}


def described(encoding: Encoding) -> dict[str, Any]:
  """What decides the bytes of videos that are encoded again; nothing where they are kept."""
  return {} if encoding.kind == 'keep' else dataclasses.asdict(encoding)


def hard_limit(time_limit: float) -> float:
  """Seconds until a decoder that does not look at its limit, because it hangs, is ended with its process."""
  return 1.25 * time_limit + 1 if time_limit else 0
