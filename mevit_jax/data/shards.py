"""Writes a dataset's shards: the unit of work, and of going on where a killed run stopped.

A dataset's directory holds ArrayRecord shards, TFDS's metadata, `fingerprint.json`, and, only while
it is being written, `unfinished/` with a receipt for every shard that is whole.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from mevit_jax.data import builders
from mevit_jax.data.datasets import UNFINISHED
from mevit_jax.errors import UserError

Progress = Callable[[int, int], None]  # (done, total)
Record = tuple[str, int, str]  # id, label, sha256 of the video's bytes
Receipt = dict[str, Any]  # 'key': of the items, 'bytes': of the file, 'records': list of Record


def write(
  builder: builders.VideoBuilder,
  workers: int = 0,
  progress: Progress = lambda done, total: None,
  asked: Mapping[str, Any] | None = None,
) -> str:
  """Writes a dataset, or what a killed run left of it to write, and returns its fingerprint.

  Args:
    builder: its data_path is written; shards of another plan that lie there are removed.
    workers: how many processes; 0 means this one.
    progress: called with how many examples are written, and of how many.
    asked: kept with the fingerprint: the arguments that decided what the dataset holds.

  Raises:
    UserError: whatever the builder's `make` raises; a process died; the disk is full.
  """
  directory = Path(builder.data_path)
  begin(directory)
  jobs = {
    f'{builder.name}-{split}.array_record-{i:05d}-of-{len(shards):05d}': (split, items)
    for split, shards in builder.shards.items()
    for i, items in enumerate(shards)
  }
  for path in directory.glob('*.array_record-*'):
    if path.name not in jobs:
      path.unlink()
  receipts = _write_shards(builder, directory, jobs, workers, progress)
  records: dict[str, list[Record]] = {split: [] for split in builder.shards}
  for file, (split, _) in jobs.items():
    records[split] += map(tuple, receipts[file]['records'])
  mark = fingerprint(builder.class_names, records)
  videos = {split: len(rows) for split, rows in records.items()}
  text = json.dumps({'fingerprint': mark, 'videos': videos, 'asked': dict(asked or {})}, indent=2)
  (directory / 'fingerprint.json').write_text(text + '\n')
  _write_metadata(builder, directory, jobs, receipts)
  shutil.rmtree(directory / UNFINISHED)
  return mark


def begin(directory: Path) -> None:
  """Marks a dataset's directory as unfinished, until `write` has written all of it."""
  (directory / UNFINISHED).mkdir(parents=True, exist_ok=True)
  (directory / 'dataset_info.json').unlink(missing_ok=True)


def fingerprint(class_names: Sequence[str], splits: Mapping[str, Sequence[Record]]) -> str:
  """A sha256 of what a dataset teaches: its class names, and which video has which label."""
  content = [list(class_names), {split: sorted(records) for split, records in splits.items()}]
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def in_processes(function: Callable[..., Any], arguments: Sequence[tuple], workers: int) -> Iterator[tuple[int, Any]]:
  """Yields (i, function(*arguments[i])) as they come; with 0 workers, from this process.

  Raises:
    BrokenProcessPool: a process died; what was not yielded is not known to be done.
  """
  if workers < 1 or not arguments:
    yield from ((i, function(*each)) for i, each in enumerate(arguments))
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(arguments)),
    # Not fork: a lock that another thread holds at that moment would stay shut in the child.
    mp_context=multiprocessing.get_context('spawn'),
    initializer=signal.signal,  # Ctrl-C is the parent's to handle.
    initargs=(signal.SIGINT, signal.SIG_IGN),
  )
  try:
    futures = {pool.submit(function, *each): i for i, each in enumerate(arguments)}
    for future in concurrent.futures.as_completed(futures):
      yield futures[future], future.result()
  finally:
    pool.shutdown(cancel_futures=True)


def _write_shards(
  builder: builders.VideoBuilder,
  directory: Path,
  jobs: Mapping[str, tuple[str, Sequence[Any]]],
  workers: int,
  progress: Progress,
) -> dict[str, Receipt]:
  """Writes the shards that have no receipt yet; returns every shard's receipt."""
  keys = {file: _key(builder.class_names, items) for file, (_, items) in jobs.items()}
  known = {file: _read_receipt(directory, file, key) for file, key in keys.items()}
  receipts = {file: receipt for file, receipt in known.items() if receipt}
  files = [file for file in jobs if file not in receipts]
  total = sum(len(items) for _, items in jobs.values())
  done = total - sum(len(jobs[file][1]) for file in files)
  progress(done, total)
  arguments = [(directory, file, keys[file], jobs[file][1], builder.make, builder.class_names) for file in files]
  try:
    for i, receipt in in_processes(_write_shard, arguments, workers):
      receipts[files[i]] = receipt
      done += len(receipt['records'])
      progress(done, total)
  except BrokenProcessPool as error:
    raise UserError(
      f'a process that wrote {directory} died, perhaps of too little memory: run the command again'
      ' to go on (fewer --workers need less)'
    ) from error
  return receipts


def _write_shard(
  directory: Path,
  file: str,
  key: str,
  items: Sequence[Any],
  make: Callable[[Any], dict[str, Any]],
  class_names: tuple[str, ...],
) -> Receipt:
  """Writes one shard and its receipt, and returns the receipt."""
  features = builders.features(class_names)
  serializer = ExampleSerializer(features.get_serialized_info())
  path, partial = directory / file, directory / f'{file}.tmp'
  records = []
  try:
    writer = ArrayRecordWriter(str(partial), 'group_size:1')
    for item in items:
      example = make(item)
      encoded = features.encode_example(example)
      message = serializer.get_tf_example(encoded)
      writer.write(message.SerializeToString(deterministic=True))
      digest = hashlib.sha256(example['video']).hexdigest()
      records.append((example['id'], int(encoded['label']), digest))
    writer.close()
  except RuntimeError as error:  # the writer's only kind; a full disk is one
    raise UserError(f'{partial} cannot be written: {str(error).split(";")[0]}') from error
  partial.replace(path)
  receipt = {'key': key, 'bytes': path.stat().st_size, 'records': records}
  note = directory / UNFINISHED / f'{file}.json'
  note.with_suffix('.tmp').write_text(json.dumps(receipt))
  note.with_suffix('.tmp').replace(note)
  return receipt


def _read_receipt(directory: Path, file: str, key: str) -> Receipt | None:
  """The receipt of a shard that an earlier run wrote from the same items, if there is one."""
  try:
    receipt = json.loads((directory / UNFINISHED / f'{file}.json').read_text())
    same = receipt['key'] == key and receipt['bytes'] == (directory / file).stat().st_size
  except FileNotFoundError:
    return None
  return receipt if same else None


def _key(class_names: tuple[str, ...], items: Sequence[Any]) -> str:
  return hashlib.sha256(repr((class_names, list(items))).encode()).hexdigest()


def _write_metadata(
  builder: builders.VideoBuilder,
  directory: Path,
  jobs: Mapping[str, tuple[str, Sequence[Any]]],
  receipts: Mapping[str, Receipt],
) -> None:
  sizes = dict.fromkeys(builder.shards, 0)
  for file, (split, _) in jobs.items():
    sizes[split] += receipts[file]['bytes']
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=builder.info.features,
    split_infos=[
      tfds.core.SplitInfo(name=split, shard_lengths=[len(s) for s in shards], num_bytes=sizes[split])
      for split, shards in builder.shards.items()
    ],
    description=builder.info.description,
    disable_shuffling=True,
    check_data=False,  # It would read through TensorFlow.
  )
