"""Writes datasets: shards in parallel, then the metadata that describes them."""

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

from mevit_jax.datasets import builders, reader, statistics, tasks
from mevit_jax.datasets.reader import COLUMNS, FORMAT, IN_PROGRESS
from mevit_jax.datasets.tasks import Check, Executor, ProgressCallback, Row, Task
from mevit_jax.errors import UserError
from mevit_jax.files import atomic_path, write_json

Record = tuple[str, int, str]  # id, label, SHA-256 of the source file
Rows = Iterator[tuple[str, Row]]  # split, row of a video

# Name of the replaced version while another takes its place: the lowest version, read only if it is the only one.
_REPLACED = '0.0.0'


def write(
  builder: builders.VideoBuilder,
  executor: Executor = tasks.run_local,
  progress: ProgressCallback = lambda done, total: None,
  check: Check = lambda dead, total: None,
  arguments: Mapping[str, Any] | None = None,
  report: Callable[[Callable[[], Rows]], None] = lambda rows: None,
) -> str:
  """Writes a dataset, or the rest of one if a run was interrupted, and returns its fingerprint.

  Args:
    builder: dataset to write, at its data_path; shards there of another plan are removed.
    executor, progress, check: see `tasks.run`.
    arguments: arguments that decide the dataset's content, saved with the fingerprint.
    report: called when all shards are written, with a function that yields the row of every video, dead ones too; if
      it raises, the dataset stays incomplete.

  Raises:
    UserError: the builder's `make`, `check` or `report` raised it, a process died, or the disk is full.
  """
  directory = Path(builder.data_path)
  (directory / IN_PROGRESS).mkdir(parents=True, exist_ok=True)  # until everything is written
  (directory / 'dataset_info.json').unlink(missing_ok=True)
  splits = {split: _make_tasks(builder, split) for split in builder.shards}
  plan = [task for split_tasks in splits.values() for task in split_tasks]
  names = {name for task in plan for name in (task.name, f'{task.name}.json')}
  for path in (*directory.glob('*.array_record-*'), *(directory / tasks.MANIFESTS).glob('*.json')):
    if path.name not in names:
      path.unlink()
  tasks.run(directory, plan, executor, progress, check)
  rows = functools.partial(_read_rows, directory, splits)
  report(rows)
  digest = _write_metadata(builder, directory, splits, rows, arguments or {})
  shutil.rmtree(directory / IN_PROGRESS)
  return digest


@contextlib.contextmanager
def open_for_writing(directory: Path, overwrite: bool = False) -> Iterator[Path]:
  """Locks a dataset against other commands and yields the directory to write it to.

  That is `directory` itself or, to overwrite a complete dataset, a staging directory that replaces it when the body
  succeeds. Killed at any moment, a complete dataset remains readable, and the next call yields the directory that the
  body had written to.
  """
  with _lock(directory.parent):
    _finish_replacement(directory)
    staging, replaced = staging_directory(directory), directory.with_name(_REPLACED)
    removed_by_user = staging.exists() and not directory.exists()  # the old one was deleted to free disk space
    if not removed_by_user and not (overwrite and reader.is_complete(directory)):
      yield directory
      return
    yield staging
    if directory.exists():
      directory.rename(replaced)
    staging.rename(directory)
    shutil.rmtree(staging.parents[1])
    _finish_replacement(directory)


def staging_directory(directory: Path) -> Path:
  """Returns the directory where a new version is written while `directory` stays readable."""
  return directory.parent / '.staging' / directory.parent.name / directory.name


def recover(directory: Path) -> None:
  """Restores a dataset if a command was killed while it was being replaced."""
  if directory.with_name(_REPLACED).exists():
    with _lock(directory.parent):
      _finish_replacement(directory)


def _finish_replacement(directory: Path) -> None:
  """Completes an interrupted replacement: keeps the new dataset if it is in place, else the old one."""
  replaced = directory.with_name(_REPLACED)
  if replaced.exists() and directory.exists():
    shutil.rmtree(replaced)
  elif replaced.exists():
    replaced.rename(directory)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
  """Locks a dataset's folder; raises a UserError if another command holds the lock."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f'another command is preparing {folder}; wait for it, or stop it') from None
    yield


def find_damaged(directory: Path) -> list[str]:
  """Returns the names of the shards of a complete dataset that are missing or truncated."""
  names = []
  for path in sorted((directory / tasks.MANIFESTS).glob('*.json')):
    shard = directory / path.stem
    if not shard.exists() or shard.stat().st_size != json.loads(path.read_text())['bytes']:
      names.append(shard.name)
  return names


def fingerprint(
  class_names: Sequence[str], splits: Mapping[str, Iterable[Record]], encoding: Mapping[str, Any] | None = None
) -> str:
  """Returns a SHA-256 of the class names, of the id, label and bytes of every video, and of the encoding.

  For re-encoded videos the bytes of the source file count, because the encoder's output differs between its versions.

  Args:
    class_names: name of each label id.
    splits: records of each split, in the dataset's order.
    encoding: settings of re-encoded videos.
  """
  digest = hashlib.sha256()

  def add(*parts: str) -> None:
    digest.update(''.join(parts).encode())

  add('[', json.dumps(list(class_names)), ', {')
  for i, split in enumerate(sorted(splits)):
    add(', ' if i else '', json.dumps(split), ': [')
    for j, record in enumerate(splits[split]):
      add(', ' if j else '', json.dumps(record))
    add(']')
  add('}', f', {json.dumps(dict(encoding), sort_keys=True)}' if encoding else '', ']')
  return digest.hexdigest()


def group_items(items: Sequence[Any], size: Callable[[Any], int], limit: int) -> list[list[Any]]:
  """Groups consecutive items so that the sum of `size` is at most `limit`, with at least one item per group."""
  groups: list[list[Any]] = []
  room = 0
  for item in items:
    if not groups or size(item) > room:
      groups.append([])
      room = limit
    groups[-1].append(item)
    room -= size(item)
  return groups


def _make_tasks(builder: builders.VideoBuilder, split: str) -> list[Task]:
  shards = builder.shards[split]
  return [
    Task(
      f'{builder.name}-{split}.array_record-{i:05d}-of-{len(shards):05d}',
      items,
      builder.make,
      builder.dead_example,
      builder.class_names,
      dict(builder.encoding),
      builder.time_limit,
    )
    for i, items in enumerate(shards)
  ]


def _read_rows(directory: Path, splits: Mapping[str, Sequence[Task]]) -> Rows:
  """Yields the row of every video, in the order of the shards."""
  for split, plan in splits.items():
    for task in plan:
      yield from ((split, row) for row in tasks.require_manifest(directory, task)['rows'])


def _write_metadata(
  builder: builders.VideoBuilder,
  directory: Path,
  splits: Mapping[str, Sequence[Task]],
  rows: Callable[[], Rows],
  arguments: Mapping[str, Any],
) -> str:
  """Writes videos.csv, TFDS's metadata and fingerprint.json with the pixel statistics; returns the fingerprint."""
  _write_table(directory / 'videos.csv', builder.class_names, rows())
  records = {
    split: ((row['id'], int(row['label']), row['sha256']) for row in reader.read_videos(directory, split))
    for split in splits
  }
  digest = fingerprint(builder.class_names, records, builder.encoding)
  infos = []
  for split, plan in splits.items():
    lengths, size = [], 0
    for task in plan:
      manifest = tasks.require_manifest(directory, task)
      lengths.append(sum('dead' not in row for row in manifest['rows']))
      size += manifest['bytes']
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
  _write_tfds_metadata(builder, directory, infos)
  first = next((info.name for info in infos if sum(info.shard_lengths)), None)  # train, unless there is none
  examples = tfds.builder_from_directory(directory).as_data_source(first) if first else []
  metadata = {
    'format': FORMAT,
    'fingerprint': digest,
    'videos': {info.name: sum(info.shard_lengths) for info in infos},
    'encoding': dict(builder.encoding),
    'arguments': dict(arguments),
    'pixels': statistics.measure_pixels(examples),
  }
  write_json(directory / 'fingerprint.json', metadata)
  return digest


def _write_tfds_metadata(builder: builders.VideoBuilder, directory: Path, infos: Sequence[Any]) -> None:
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=builder.info.features,
    split_infos=infos,
    description=builder.info.description,
    disable_shuffling=True,
    check_data=False,  # the check would read through TensorFlow
  )


def _write_table(path: Path, class_names: Sequence[str], rows: Rows) -> None:
  """Writes videos.csv: the rows of the usable videos, with label ids."""
  labels = {'': -1, **{name: i for i, name in enumerate(class_names)}}
  with atomic_path(path) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
    table = csv.DictWriter(file, COLUMNS, extrasaction='ignore', restval='', lineterminator='\n')
    table.writeheader()
    usable = ((split, row) for split, row in rows if 'dead' not in row)
    table.writerows({'split': split, **row, 'label': labels[row['label']]} for split, row in usable)
