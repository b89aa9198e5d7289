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

from mevit_jax.data import builders, datasets, tasks
from mevit_jax.data.datasets import COLUMNS, FORMAT, UNFINISHED
from mevit_jax.data.tasks import Check, Engine, Progress, Row, Task
from mevit_jax.errors import UserError

Record = tuple[str, int, str]  # id, label, sha256 of the video's bytes as they were found
Rows = Iterator[tuple[str, Row]]  # split, what is known of a video


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
  begin(directory)
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
def alone(directory: Path) -> Iterator[None]:
  """Keeps a second command away from what this one writes; a UserError if that is the second one."""
  folder = directory.parent
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f'another command is preparing {folder}: wait for it, or stop it') from None
    yield


def begin(directory: Path, afresh: bool = False) -> None:
  """Marks a dataset's directory as unfinished, until `write` has written all of it; afresh: without what is there."""
  (directory / UNFINISHED).mkdir(parents=True, exist_ok=True)
  (directory / 'dataset_info.json').unlink(missing_ok=True)
  if afresh:
    shutil.rmtree(directory / tasks.RECEIPTS, ignore_errors=True)


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
