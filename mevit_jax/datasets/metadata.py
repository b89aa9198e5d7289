"""Metadata of a dataset: a table of its videos, TFDS's files, and fingerprint.json with the checksums of the others.

All of it is rebuilt from the shards' manifests if a file is damaged.
"""

import csv
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mevit_jax.datasets import builders, reader, statistics, tasks
from mevit_jax.datasets.reader import COLUMNS, COPY, FINGERPRINT, FORMAT, TFDS_FILES, VIDEOS
from mevit_jax.datasets.tasks import Row
from mevit_jax.errors import UserError
from mevit_jax.files import atomic_path, read_checked_json, write_checked_json, write_text

Record = tuple[str, int, str]  # id, label, SHA-256 of the source file
Rows = Callable[[], Iterator[tuple[str, Row]]]  # returns the split and row of every video, unusable ones too
Manifests = Mapping[str, Sequence[Path]]  # manifests of each split's shards, in order

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Properties:
  """Properties of a dataset that its manifests do not hold.

  Attributes:
    class_names: name of each label id.
    description: text about the dataset.
    encoding: settings of re-encoded videos; empty if their bytes are kept.
    arguments: arguments that the dataset was prepared with.
  """

  class_names: Sequence[str]
  description: str
  encoding: Mapping[str, Any]
  arguments: Mapping[str, Any]


def read_rows(manifests: Manifests) -> Iterator[tuple[str, Row]]:
  """Yields the split and row of every video, in the order of the shards."""
  for split, paths in manifests.items():
    for path in paths:
      yield from ((split, row) for row in tasks.load_manifest(path)['rows'])


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


def write(directory: Path, properties: Properties, manifests: Manifests) -> str:
  """Writes all metadata of a dataset whose shards are complete, and returns its fingerprint."""
  content = _write_files(directory, properties, manifests)
  first = next((split for split, count in content['videos'].items() if count), None)  # train, unless there is none
  examples = tfds.builder_from_directory(directory).as_data_source(first) if first else []
  return _write_fingerprint(directory, properties, {**content, 'pixels': statistics.measure_pixels(examples)})


def restore_fingerprint(directory: Path) -> None:
  """Restores a damaged fingerprint.json from its copy, or the copy, and logs it; does nothing if both are damaged."""
  for name, other in ((FINGERPRINT, COPY), (COPY, FINGERPRINT)):
    reason = reader.damage(directory / name)
    if reason and not reader.damage(directory / other):
      _LOG.warning('%s was damaged (%s) and has been restored from %s', directory / name, reason, other)
      write_text(directory / name, (directory / other).read_text('utf-8'))


def rebuild(directory: Path) -> None:
  """Rebuilds damaged metadata of a complete dataset from its manifests, and logs the names of the files.

  Raises:
    UserError: the manifests do not match the fingerprint.
  """
  saved = read_checked_json(directory / FINGERPRINT)
  names = ', '.join(reader.find_damaged(directory, saved['checksums']))
  manifests = {split: sorted(_find_manifests(directory, split)) for split in saved['videos']}
  properties = Properties(**{name: saved[name] for name in ('class_names', 'description', 'encoding', 'arguments')})
  if _digest(properties, manifests) != saved['fingerprint']:
    raise UserError(
      f'{directory}: {names} is damaged, and the manifests do not match the fingerprint; prepare it again, with'
      ' --overwrite'
    )
  _write_files(directory, properties, manifests)
  _write_fingerprint(directory, properties, saved)
  _LOG.warning('%s: %s was damaged and has been rebuilt', directory, names)


def _find_manifests(directory: Path, split: str) -> Iterator[Path]:
  return (directory / tasks.MANIFESTS).glob(f'{directory.parent.name}-{split}.array_record-*.json')


def _digest(properties: Properties, manifests: Manifests) -> str:
  """Returns the fingerprint of the usable videos."""
  labels = _label_ids(properties.class_names)

  def records(split: str) -> Iterator[Record]:
    rows = (row for _, row in read_rows({split: manifests[split]}) if 'unusable' not in row)
    return ((row['id'], labels[row['label']], row['sha256']) for row in rows)

  return fingerprint(properties.class_names, {split: records(split) for split in manifests}, properties.encoding)


def _write_files(directory: Path, properties: Properties, manifests: Manifests) -> dict[str, Any]:
  """Writes videos.csv and TFDS's files; returns the fingerprint and the number of videos of each split."""
  _write_table(directory / VIDEOS, properties.class_names, functools.partial(read_rows, manifests))
  infos = []
  for split, paths in manifests.items():
    lengths, size = [], 0
    for path in paths:
      manifest = tasks.load_manifest(path)
      lengths.append(sum('unusable' not in row for row in manifest['rows']))
      size += manifest['bytes']
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=builders.features(properties.class_names),
    split_infos=infos,
    description=properties.description,
    disable_shuffling=True,
    check_data=False,  # the check would read through TensorFlow
  )
  videos = {info.name: sum(info.shard_lengths) for info in infos}
  return {'fingerprint': _digest(properties, manifests), 'videos': videos}


def _write_fingerprint(directory: Path, properties: Properties, content: Mapping[str, Any]) -> str:
  """Writes fingerprint.json, with the checksums of the other files, and its copy; returns the fingerprint."""
  metadata = {
    **content,
    'format': FORMAT,
    'encoding': dict(properties.encoding),
    'arguments': dict(properties.arguments),
    'class_names': list(properties.class_names),
    'description': properties.description,
    'checksums': {name: reader.checksum(directory / name) for name in (*TFDS_FILES, VIDEOS)},
  }
  for name in (FINGERPRINT, COPY):
    write_checked_json(directory / name, metadata)
  return metadata['fingerprint']


def _write_table(path: Path, class_names: Sequence[str], rows: Rows) -> None:
  """Writes videos.csv: the rows of the usable videos, with label ids."""
  labels = _label_ids(class_names)
  with atomic_path(path) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
    table = csv.DictWriter(file, COLUMNS, extrasaction='ignore', restval='', lineterminator='\n')
    table.writeheader()
    usable = ((split, row) for split, row in rows() if 'unusable' not in row)
    table.writerows({'split': split, **row, 'label': labels[row['label']]} for split, row in usable)


def _label_ids(class_names: Sequence[str]) -> dict[str, int]:
  return {'': -1, **{name: i for i, name in enumerate(class_names)}}
