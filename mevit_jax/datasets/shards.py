"""Writes a dataset: its shards, in processes or on a cluster, and what says of it what it is."""

import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mevit_jax.datasets import builders, tasks
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets.reader import COLUMNS, FORMAT, UNFINISHED
from mevit_jax.datasets.tasks import Check, Engine, Progress, Row, Task
from mevit_jax.errors import UserError

Record = tuple[str, int, str]  # id, label, sha256 of the video's bytes as they were found
Rows = Iterator[tuple[str, Row]]  # split, what is known of a video

# What a complete dataset is called while another takes its place: the lowest version, read where there is no other.
_OLD = '0.0.0'


def write(
  builder: builders.VideoBuilder,
  engine: Engine = tasks.supervise,
  progress: Progress = lambda done, total: None,
  check: Check = lambda dead, total: None,
  asked: Mapping[str, Any] | None = None,
  report: Callable[[Callable[[], Rows]], None] = lambda rows: None,
) -> str:
  """Writes a dataset, or what a killed run left of it to write, and returns its fingerprint.

  Args:
    builder: its data_path is written; shards of another plan that lie there are removed.
    engine, progress, check: as `tasks.run` says.
    asked: kept with the fingerprint: the arguments that decided what the dataset holds.
    report: called, when all shards are there, with a function that gives every video's row, dead
      ones too; if it raises, the dataset stays unfinished.

  Raises:
    UserError: whatever the builder's `make`, `check` and `report` raise; a process died; the disk
      is full.
  """
  directory = Path(builder.data_path)
  (directory / UNFINISHED).mkdir(parents=True, exist_ok=True)  # until all of it is written
  (directory / 'dataset_info.json').unlink(missing_ok=True)
  splits = {split: _tasks(builder, split) for split in builder.shards}
  plan = [task for each in splits.values() for task in each]
  names = {name for task in plan for name in (task.name, f'{task.name}.json')}
  for path in (*directory.glob('*.array_record-*'), *(directory / tasks.RECEIPTS).glob('*.json')):
    if path.name not in names:
      path.unlink()
  tasks.run(directory, plan, engine, progress, check)
  rows = functools.partial(_rows, directory, splits)
  report(rows)
  mark = _describe(builder, directory, splits, rows, asked or {})
  shutil.rmtree(directory / UNFINISHED)
  return mark


@contextlib.contextmanager
def place(directory: Path, overwrite: bool = False) -> Iterator[Path]:
  """Keeps other commands away from a dataset, and gives the directory to write it to.

  That is its own; to overwrite a complete one, another beside it, which takes its place when the body ends well. Killed
  at any moment, there is a complete one to read; and what the body had written is given again.
  """
  with _alone(directory.parent):
    _put_back(directory)
    new, old = beside(directory), directory.with_name(_OLD)
    removed = new.exists() and not directory.exists()  # the old one, to make room
    if not removed and not (overwrite and datasets.is_complete(directory)):
      yield directory
      return
    yield new
    if directory.exists():
      directory.rename(old)
    new.rename(directory)
    shutil.rmtree(new.parents[1])
    _put_back(directory)


def beside(directory: Path) -> Path:
  """Where what overwrites a dataset is written: the same path of another data_dir, in the dataset's own folder."""
  return directory.parent / '.new' / directory.parent.name / directory.name


def mend(directory: Path) -> None:
  """Puts a dataset back if a command was killed while another one took its place."""
  if directory.with_name(_OLD).exists():
    with _alone(directory.parent):
      _put_back(directory)


def _put_back(directory: Path) -> None:
  """Ends a change of places wherever it was killed: with the old one if the new one is not there yet."""
  old = directory.with_name(_OLD)
  if old.exists() and directory.exists():
    shutil.rmtree(old)
  elif old.exists():
    old.rename(directory)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
  """Keeps a second command away from what this one writes; a UserError if that is the second one."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f'another command is preparing {folder}: wait for it, or stop it') from None
    yield


def lost(directory: Path) -> list[str]:
  """The shards of a complete dataset that are not there, or not whole."""
  names = []
  for path in sorted((directory / tasks.RECEIPTS).glob('*.json')):
    shard = directory / path.stem
    if not shard.exists() or shard.stat().st_size != json.loads(path.read_text())['bytes']:
      names.append(shard.name)
  return names


def fingerprint(
  class_names: Sequence[str], splits: Mapping[str, Iterable[Record]], encoding: Mapping[str, Any] | None = None
) -> str:
  """A sha256 of what a dataset teaches: its class names, which video has which label, how they were encoded anew.

  The records of a split come in the dataset's own order. Of a video that was encoded anew it is the bytes before that
  count: what the codec makes of them differs between its versions.
  """
  mark = hashlib.sha256()

  def add(*parts: str) -> None:
    mark.update(''.join(parts).encode())

  add('[', json.dumps(list(class_names)), ', {')
  for i, split in enumerate(sorted(splits)):
    add(', ' if i else '', json.dumps(split), ': [')
    for j, record in enumerate(splits[split]):
      add(', ' if j else '', json.dumps(record))
    add(']')
  add('}', f', {json.dumps(dict(encoding), sort_keys=True)}' if encoding else '', ']')
  return mark.hexdigest()


def group(items: Sequence[Any], size: Callable[[Any], int], limit: int) -> list[list[Any]]:
  """Cuts items into consecutive shards of at most `limit` by `size`, each of at least one item."""
  shards: list[list[Any]] = []
  room = 0
  for item in items:
    if not shards or size(item) > room:
      shards.append([])
      room = limit
    shards[-1].append(item)
    room -= size(item)
  return shards


def _tasks(builder: builders.VideoBuilder, split: str) -> list[Task]:
  shards = builder.shards[split]
  return [
    Task(
      f'{builder.name}-{split}.array_record-{i:05d}-of-{len(shards):05d}',
      items,
      builder.make,
      builder.dead,
      builder.class_names,
      dict(builder.encoding),
      builder.time_limit,
    )
    for i, items in enumerate(shards)
  ]


def _rows(directory: Path, splits: Mapping[str, Sequence[Task]]) -> Rows:
  """Every video's row, in the order of the shards."""
  for split, plan in splits.items():
    for task in plan:
      yield from ((split, row) for row in tasks.receipt_of(directory, task)['rows'])


def _describe(
  builder: builders.VideoBuilder,
  directory: Path,
  splits: Mapping[str, Sequence[Task]],
  rows: Callable[[], Rows],
  asked: Mapping[str, Any],
) -> str:
  """Writes videos.csv, fingerprint.json and TFDS's metadata; returns the fingerprint."""
  labels = {'': -1, **{name: i for i, name in enumerate(builder.class_names)}}
  with (directory / 'videos.csv').open('w', newline='', encoding='utf-8') as file:
    table = csv.DictWriter(file, COLUMNS, extrasaction='ignore', restval='', lineterminator='\n')
    table.writeheader()
    usable = ((split, row) for split, row in rows() if 'dead' not in row)
    table.writerows({'split': split, **row, 'label': labels[row['label']]} for split, row in usable)
  records = {
    split: ((row['id'], int(row['label']), row['sha256']) for row in datasets.read_videos(directory, split))
    for split in splits
  }
  mark = fingerprint(builder.class_names, records, builder.encoding)
  infos = []
  for split, plan in splits.items():
    lengths, size = [], 0
    for task in plan:
      receipt = tasks.receipt_of(directory, task)
      lengths.append(sum('dead' not in row for row in receipt['rows']))
      size += receipt['bytes']
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
  about = {'format': FORMAT, 'fingerprint': mark, 'videos': {info.name: sum(info.shard_lengths) for info in infos}}
  about |= {'encoding': dict(builder.encoding), 'asked': dict(asked)}
  (directory / 'fingerprint.json').write_text(json.dumps(about, indent=2) + '\n')
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=builder.info.features,
    split_infos=infos,
    description=builder.info.description,
    disable_shuffling=True,
    check_data=False,  # It would read through TensorFlow.
  )
  return mark
