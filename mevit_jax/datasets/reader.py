"""Reads prepared datasets: `open_split` returns a random-access source for Grain or a plain loop.

Besides its shards and TFDS's metadata, a dataset's directory holds `fingerprint.json` (format, fingerprint, arguments,
pixel statistics, checksums of the other files), a copy of it, and `videos.csv` (one row per video).
"""

import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError
from mevit_jax.files import read_checked_json

FORMAT = 4  # version of the layout of a dataset's directory; datasets of another version must be prepared again
FINGERPRINT, COPY, VIDEOS = 'fingerprint.json', 'fingerprint.copy.json', 'videos.csv'
TFDS_FILES = 'dataset_info.json', 'features.json', 'label.labels.txt'
IN_PROGRESS = 'in_progress'  # folder that exists in a dataset's directory while it is written
COLUMNS = (  # columns of videos.csv; label is an id, -1 for none; sha256 is that of the source file
  'split', 'id', 'label', 'bytes', 'sha256', 'num_frames', 'fps', 'duration', 'height', 'width', 'damage',
)  # fmt: skip


class Source(Protocol):
  """Random access to the examples of a split."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Videos:
  """The examples of a split, a `Source`; picklable, for Grain's worker processes.

  An example is a dict: video (bytes of the encoded file), label (int), id (str), num_frames, height, width (int), fps
  (float, frames per second), duration (float, seconds).
  """

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    example = self._source[index]
    return {**example, 'id': example['id'].decode()}

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[i] for i in range(len(self)))

  def __repr__(self) -> str:
    return f'Videos({self._source!r})'


@dataclasses.dataclass(frozen=True)
class Split:
  """One split of a prepared dataset.

  Attributes:
    source: random access to its examples.
    class_names: name of each label id.
    fingerprint: SHA-256 of the class names, ids, labels and bytes of all splits.
    name: name of the split.
    dataset: name of the dataset.
    directory: directory of the dataset.
    videos: number of videos of each split of the dataset.
    normalization: pixel mean and standard deviation of the training videos; None if the dataset does not state them.
  """

  source: Source
  class_names: tuple[str, ...]
  fingerprint: str
  name: str
  dataset: str
  directory: Path
  videos: Mapping[str, int]
  normalization: Normalization | None = None

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """Label of every example, int32, -1 for none; read from videos.csv on first use."""
    return read_labels(self.directory, self.name)

  def verify(self) -> None:
    """Raises a UserError if the first video of the shards is not that of videos.csv, as if files were exchanged."""
    expected = next(read_videos(self.directory, self.name), {'id': ''})['id']
    found = self.source[0]['id'] if len(self) else ''
    if found != expected:
      raise UserError(
        f'{self.directory} is damaged: the first video in the shards of {self.name} is {found!r}, not {expected!r}; '
        'prepare the dataset again, with --overwrite'
      )

  def __str__(self) -> str:
    classes = len(self.class_names)
    return f'{self.dataset}/{self.name}, {len(self):,} videos of {classes} classes, fingerprint {self.fingerprint[:12]}'

  def __len__(self) -> int:
    return len(self.source)


def open_split(data_dir: str | Path, dataset: str, split: str) -> Split:
  """Opens a split of the newest version of a dataset that `mevit prepare` wrote to DATA_DIR/DATASET/VERSION.

  Raises:
    UserError: the dataset or split does not exist (the message names those that do), is incomplete or damaged.
  """
  # Imported here because these take seconds to import.
  import tensorflow_datasets as tfds
  from google.protobuf.json_format import ParseError

  directory = _newest_version(Path(data_dir).expanduser(), dataset)
  check_format(directory)
  _require_undamaged(directory, TFDS_FILES)
  try:
    builder = tfds.builder_from_directory(directory)
    fingerprint, videos = read_fingerprint(directory)
  except (OSError, ValueError, KeyError, ParseError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f'{directory} is damaged: {reason}; prepare it again, with --overwrite') from error
  if split not in builder.info.splits:
    raise UserError(f'dataset {dataset} has no split {split!r}; it has: {_join(builder.info.splits)}')
  _check_shards(directory, builder.info.splits[split])
  return Split(
    source=Videos(builder.as_data_source(split)),
    class_names=tuple(builder.info.features['label'].names),
    fingerprint=fingerprint,
    name=split,
    dataset=dataset,
    directory=directory,
    videos=videos,
    normalization=read_normalization(directory),
  )


def _check_shards(directory: Path, info: Any) -> None:
  """Raises a UserError if shards of a split are missing or truncated."""
  repair = 'run its prepare command again to write the lost shards'
  if missing := [path.name for path in info.filepaths if not path.exists()]:
    raise UserError(f'{directory} is damaged: {missing[0]} does not exist; {repair}')
  size = sum(map(os.path.getsize, info.filepaths))
  if size != info.num_bytes:
    raise UserError(f'{directory} is damaged: {info.name} has {size} bytes, not {int(info.num_bytes)}; {repair}')


def _newest_version(data_dir: Path, dataset: str) -> Path:
  """Returns the directory of the newest complete version of a dataset."""
  versions = [path for path in (data_dir / dataset).glob('*.*.*') if path.is_dir()]
  complete = [path for path in versions if is_complete(path)]
  if complete:
    return max(complete, key=lambda path: [int(part) for part in path.name.split('.')])
  if versions:
    raise UserError(f'{versions[0]} is not complete; run the same prepare command again to continue')
  if dataset.startswith(('kinetics', 'something_something')):
    arguments = f'{dataset} VIDEOS --annotations=LISTS'
  else:
    arguments = dataset if dataset == 'moving_shapes' else f'video_folder ROOT --name={dataset}'
  prepare = f'mevit prepare {arguments} --data_dir={data_dir}'
  names = {path.parent.parent.name for path in data_dir.glob('*/*/dataset_info.json')}
  raise UserError(f'{data_dir} has no dataset {dataset!r}; it has: {_join(names)}; prepare it first: {prepare}')


def is_complete(directory: Path) -> bool:
  """Returns True if a dataset's directory holds a complete dataset."""
  written = any((directory / name).is_file() for name in ('dataset_info.json', FINGERPRINT, COPY))
  return written and not (directory / IN_PROGRESS).exists()


def check_format(directory: Path) -> None:
  """Raises a UserError if fingerprint.json is damaged, or of another format than this program reads."""
  path = directory / FINGERPRINT
  try:
    content = json.loads(path.read_bytes().decode())
    version = content.get('format', 1) if isinstance(content, dict) else FORMAT
    if version == FORMAT or 'sha256' in content:  # there was no checksum before format 4
      version = read_checked_json(path)['format']
  except (OSError, ValueError) as error:
    remedy = ', with --overwrite' if damage(directory / COPY) else ' with the same command to restore it'
    raise UserError(f'{directory} is damaged ({FINGERPRINT}: {error}); prepare it again{remedy}') from error
  if version != FORMAT:
    raise UserError(
      f'{directory} has format {version}, but this program reads format {FORMAT}; prepare it again, with --overwrite'
    )


def damage(path: Path) -> str:
  """Returns the reason why fingerprint.json or its copy cannot be used; '' if it can."""
  try:
    read_checked_json(path)
  except (OSError, ValueError) as error:
    return getattr(error, 'strerror', None) or str(error)
  return ''


def find_damaged(directory: Path, names: Iterable[str]) -> list[str]:
  """Returns those of a dataset's metadata files that are missing or do not match their checksum."""
  checksums = _read_metadata(directory)['checksums']
  return [name for name in names if checksum(directory / name) != checksums[name]]


def checksum(path: Path) -> str:
  """Returns a file's SHA-256; '' if it does not exist."""
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except FileNotFoundError:
    return ''


def _require_undamaged(directory: Path, names: Iterable[str]) -> None:
  if damaged := find_damaged(directory, names):
    raise UserError(
      f'{directory} is damaged: {", ".join(damaged)} does not match its checksum; prepare it again with the same'
      ' command to rebuild it'
    )


def read_fingerprint(directory: Path) -> tuple[str, dict[str, int]]:
  """Returns the fingerprint and the number of videos of each split of a complete dataset; reads no shards."""
  metadata = _read_metadata(directory)
  return metadata['fingerprint'], metadata['videos']


def read_normalization(directory: Path) -> Normalization | None:
  """Returns the pixel mean and standard deviation of a complete dataset; None if it does not state them."""
  pixels = _read_metadata(directory).get('pixels')
  return Normalization(tuple(pixels['mean']), tuple(pixels['std'])) if pixels else None


def read_arguments(directory: Path) -> dict[str, Any]:
  """Returns the arguments that a complete dataset was prepared with; empty if none were recorded."""
  return _read_metadata(directory).get('arguments', {})


def read_labels(directory: Path, split: str) -> np.ndarray:
  """Returns the labels of a split's examples in order, int32, -1 for none; reads no shards."""
  return np.array([int(row['label']) for row in read_videos(directory, split)], np.int32)


def read_sizes(directory: Path, split: str) -> np.ndarray:
  """Returns height and width of a split's videos in pixels, int `n 2`; reads no shards."""
  return np.array([(row['height'], row['width']) for row in read_videos(directory, split)], int).reshape(-1, 2)  # n 2


def read_videos(directory: Path, split: str) -> Iterator[dict[str, str]]:
  """Yields the rows of videos.csv of a split's examples, in order; raises a UserError if it is damaged."""
  _require_undamaged(directory, (VIDEOS,))
  with (directory / VIDEOS).open(newline='', encoding='utf-8') as file:
    yield from (row for row in csv.DictReader(file) if row['split'] == split)


def differences(saved: Mapping[str, Any], requested: Mapping[str, Any], max_names: int = 3) -> list[str]:
  """Returns the differences between two datasets, one line each, as 'saved -> requested'.

  Args:
    saved, requested: mappings with `class_names`, `fingerprint` and, if known, `videos` (number of videos per split).
    max_names: number of class names that are compared by name.
  """
  lines, names = [], (saved['class_names'], requested['class_names'])
  if len(names[0]) != len(names[1]):
    lines.append(f'number of classes: {len(names[0])} -> {len(names[1])}')
  renamed = [
    f'class {i}: {"none" if old is None else repr(old)} -> {"none" if new is None else repr(new)}'
    for i, (old, new) in enumerate(itertools.zip_longest(*names))
    if old != new
  ]
  lines += renamed[:max_names]
  if len(renamed) > max_names:
    lines.append(f'{len(renamed) - max_names} more classes differ')
  counts = saved.get('videos', {}), requested.get('videos', {})
  if all(counts):
    splits = dict.fromkeys([*counts[0], *counts[1]])
    pairs = ((split, *(count.get(split, 0) for count in counts)) for split in splits)
    lines += [f'{split} videos: {old} -> {new}' for split, old, new in pairs if old != new]
  if saved['fingerprint'] != requested['fingerprint']:
    lines.append(f'dataset fingerprint: {saved["fingerprint"][:12]} -> {requested["fingerprint"][:12]}')
  return lines


def _read_metadata(directory: Path) -> dict[str, Any]:
  return read_checked_json(directory / FINGERPRINT)


def _join(names: Iterable[str]) -> str:
  return ', '.join(sorted(names)) or 'none'
