"""Reads prepared datasets: `open_split` gives what Grain, or a plain loop, takes examples from.

Beside its shards and TFDS's metadata, a dataset's directory holds `fingerprint.json` (what it is)
and `videos.csv` (a line for each video).
"""

import csv
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

import numpy as np

from mevit_jax.errors import UserError

FORMAT = 2  # of a dataset's directory; another one is prepared again
UNFINISHED = 'unfinished'  # A folder that is in a dataset's directory while it is written.
COLUMNS = (  # of videos.csv; label is a number, -1 for none, sha256 is of the file as it was found
  'split', 'id', 'label', 'bytes', 'sha256', 'num_frames', 'fps', 'duration', 'height', 'width', 'damage',
)  # fmt: skip


class Source(Protocol):
  """A dataset's examples, by index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Videos:
  """A split's examples by index, a `Source`; picklable, as Grain's worker processes need.

  An example is a dict: video (the encoded file's bytes), label (int), id (str), num_frames, height,
  width (int), fps, duration (float; frames a second, seconds).
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
    source: its examples by index.
    class_names: label i is the i-th name.
    fingerprint: sha256 over the names, ids, labels and bytes of all splits.
    name: the split's name.
    dataset: the dataset's name.
    directory: where the dataset lies.
    videos: how many videos each of the dataset's splits has.
  """

  source: Source
  class_names: tuple[str, ...]
  fingerprint: str
  name: str
  dataset: str
  directory: Path
  videos: Mapping[str, int]

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """Every example's label, int32, -1 where it has none: read from videos.csv when first asked for."""
    labels = read_labels(self.directory, self.name)
    if len(labels) != len(self):
      raise UserError(
        f'{self.directory / "videos.csv"} is damaged, prepare it again: it has {len(labels)} {self.name}'
        f' videos, and the shards have {len(self)}'
      )
    return labels

  def __str__(self) -> str:
    classes = len(self.class_names)
    return f'{self.dataset}/{self.name}, {len(self):,} videos of {classes} classes, fingerprint {self.fingerprint[:12]}'

  def __len__(self) -> int:
    return len(self.source)


def open_split(data_dir: str | Path, dataset: str, split: str) -> Split:
  """Opens DATA_DIR/DATASET/VERSION, the newest version, as `mevit prepare` wrote it.

  Raises:
    UserError: no such dataset or split (it names those that are there), or it is incomplete.
  """
  # These take a while: only where something is read.
  import tensorflow_datasets as tfds
  from google.protobuf.json_format import ParseError

  directory = _version(Path(data_dir).expanduser(), dataset)
  check_format(directory)
  try:
    builder = tfds.builder_from_directory(directory)
    mark, videos = read_fingerprint(directory)
  except (OSError, ValueError, KeyError, ParseError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f'{directory} is damaged, prepare it again: {reason}') from error
  if split not in builder.info.splits:
    raise UserError(f'dataset {dataset} has no split {split!r}; it has: {_list(builder.info.splits)}')
  _check_shards(directory, builder.info.splits[split])
  return Split(
    source=Videos(builder.as_data_source(split)),
    class_names=tuple(builder.info.features['label'].names),
    fingerprint=mark,
    name=split,
    dataset=dataset,
    directory=directory,
    videos=videos,
  )


def _check_shards(directory: Path, info: Any) -> None:
  """Raises a UserError if shards of a split are not there, or not whole."""
  again = 'give its prepare command again, which makes what was lost'
  if missing := [path.name for path in info.filepaths if not path.exists()]:
    raise UserError(f'{directory} is damaged: {missing[0]} is not there; {again}')
  size = sum(map(os.path.getsize, info.filepaths))
  if size != info.num_bytes:
    raise UserError(f'{directory} is damaged: {info.name} has {size} bytes, not {int(info.num_bytes)}; {again}')


def _version(data_dir: Path, dataset: str) -> Path:
  """The newest complete version's directory of a dataset."""
  found = [path for path in (data_dir / dataset).glob('*.*.*') if path.is_dir()]
  complete = [path for path in found if is_complete(path)]
  if complete:
    return max(complete, key=lambda path: [int(part) for part in path.name.split('.')])
  if found:  # By which command is not known before it is complete.
    raise UserError(f'{found[0]} is not complete; to go on with it, give the same prepare command again')
  if dataset.startswith(('kinetics', 'something_something')):
    what = f'{dataset} VIDEOS --annotations=LISTS'
  else:
    what = dataset if dataset == 'moving_shapes' else f'video_folder ROOT --name={dataset}'
  prepare = f'mevit prepare {what} --data_dir={data_dir}'
  names = {path.parent.parent.name for path in data_dir.glob('*/*/dataset_info.json')}
  raise UserError(f'no dataset {dataset!r} in {data_dir}; there: {_list(names)}; prepare it first: {prepare}')


def is_complete(directory: Path) -> bool:
  """Whether a dataset's directory holds all of it."""
  return (directory / 'dataset_info.json').is_file() and not (directory / UNFINISHED).exists()


def check_format(directory: Path) -> None:
  """Raises a UserError if a complete dataset was written by a program that laid it out otherwise."""
  try:
    found = _about(directory).get('format', 1)
  except (OSError, ValueError) as error:
    raise UserError(f'{directory} is damaged ({error}): prepare it again, with --overwrite') from error
  if found != FORMAT:
    raise UserError(
      f'{directory} is of format {found}, and this program reads {FORMAT}: prepare it again, with --overwrite'
    )


def read_fingerprint(directory: Path) -> tuple[str, dict[str, int]]:
  """A complete dataset's fingerprint and how many videos each split has, without its data."""
  about = _about(directory)
  return about['fingerprint'], about['videos']


def read_asked(directory: Path) -> dict[str, Any]:
  """The arguments that decided what a complete dataset holds; empty where nobody wrote them down."""
  return _about(directory).get('asked', {})


def read_labels(directory: Path, split: str) -> np.ndarray:
  """The labels of a split's examples in their order, int32, -1 where there is none, without its data."""
  return np.array([int(row['label']) for row in read_videos(directory, split)], np.int32)


def read_videos(directory: Path, split: str) -> Iterator[dict[str, str]]:
  """The lines of videos.csv on a split's examples, in their order."""
  with (directory / 'videos.csv').open(newline='', encoding='utf-8') as file:
    yield from (row for row in csv.DictReader(file) if row['split'] == split)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at_most: int = 3) -> list[str]:
  """What differs between two datasets, a line each: how many classes, the first of other names, counts, content.

  Args:
    before, now: each with `class_names`, `fingerprint` and, where it is known, `videos`, how many
      videos each split has.
    at_most: how many class names are compared by name.
  """
  lines, names = [], (before['class_names'], now['class_names'])
  if len(names[0]) != len(names[1]):
    lines.append(f'{len(names[0])} classes, and {len(names[1])}')
  others = [
    f'class {i} is {"not there" if a is None else repr(a)}, and {"not there" if b is None else repr(b)}'
    for i, (a, b) in enumerate(itertools.zip_longest(*names))
    if a != b
  ]
  lines += others[:at_most]
  if len(others) > at_most:
    lines.append(f'{len(others) - at_most} more classes')
  counts = before.get('videos', {}), now.get('videos', {})
  if all(counts):
    splits = dict.fromkeys([*counts[0], *counts[1]])
    pairs = ((split, *(count.get(split, 0) for count in counts)) for split in splits)
    lines += [f'{a} {split} videos, and {b}' for split, a, b in pairs if a != b]
  if before['fingerprint'] != now['fingerprint']:
    lines.append(f'dataset fingerprint: {before["fingerprint"][:12]}, and {now["fingerprint"][:12]}')
  return lines


def _about(directory: Path) -> dict[str, Any]:
  return json.loads((directory / 'fingerprint.json').read_text())


def _list(names: Iterable[str]) -> str:
  return ', '.join(sorted(names)) or 'none'
