"""Reads prepared datasets: `open_split` gives what Grain, or a plain loop, takes examples from."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from mevit_jax.errors import UserError

UNFINISHED = 'unfinished'  # A folder that is in a dataset's directory while it is written.


class Videos(Sequence[dict[str, Any]]):
  """A split's examples by index; picklable, as Grain's worker processes need.

  An example is a dict: video (the encoded file's bytes), label (int), id (str), num_frames, height,
  width (int), fps, duration (float; frames a second, seconds).
  """

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:  # type: ignore[override]
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
  """

  source: Sequence[dict[str, Any]]
  class_names: tuple[str, ...]
  fingerprint: str
  name: str
  dataset: str

  def __str__(self) -> str:
    classes = len(self.class_names)
    return f'{self.dataset}/{self.name}, {len(self):,} videos of {classes} classes, fingerprint {self.fingerprint[:12]}'

  def __len__(self) -> int:
    return len(self.source)

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """The label of every video, int32 `n`; -1 where there is none."""
    return np.array([example['label'] for example in self.source], np.int32)


def open_split(data_dir: str | Path, dataset: str, split: str) -> Split:
  """Opens DATA_DIR/DATASET/VERSION, the newest version, as `mevit_jax.prepare` wrote it.

  Raises:
    UserError: no such dataset or split (it names those that are there), or it is incomplete.
  """
  # These take a while: only where something is read.
  import tensorflow_datasets as tfds
  from google.protobuf.json_format import ParseError

  directory = _version(Path(data_dir).expanduser(), dataset)
  try:
    builder = tfds.builder_from_directory(directory)
    mark, _ = read_fingerprint(directory)
  except (OSError, ValueError, KeyError, ParseError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f'{directory} is damaged, prepare it again: {reason}') from error
  if split not in builder.info.splits:
    raise UserError(f'dataset {dataset} has no split {split!r}; it has: {_list(builder.info.splits)}')
  missing = [path for path in builder.info.splits[split].filepaths if not path.exists()]
  if missing:
    raise UserError(f'{directory} is damaged, prepare it again: {missing[0].name} is not there')
  return Split(
    source=Videos(builder.as_data_source(split)),
    class_names=tuple(builder.info.features['label'].names),
    fingerprint=mark,
    name=split,
    dataset=dataset,
  )


def _version(data_dir: Path, dataset: str) -> Path:
  """The newest complete version's directory of a dataset."""
  found = [path for path in (data_dir / dataset).glob('*.*.*') if path.is_dir()]
  complete = [path for path in found if is_complete(path)]
  if complete:
    return max(complete, key=lambda path: [int(part) for part in path.name.split('.')])
  if found:  # By which command is not known before it is complete.
    raise UserError(f'{found[0]} is not complete; to go on with it, give the same prepare command again')
  what = dataset if dataset == 'moving_shapes' else f'video_folder ROOT --name={dataset}'
  prepare = f'python -m mevit_jax.prepare {what} --data_dir={data_dir}'
  names = {path.parent.parent.name for path in data_dir.glob('*/*/dataset_info.json')}
  raise UserError(f'no dataset {dataset!r} in {data_dir}; there: {_list(names)}; prepare it first: {prepare}')


def is_complete(directory: Path) -> bool:
  """Whether a dataset's directory holds all of it."""
  return (directory / 'dataset_info.json').is_file() and not (directory / UNFINISHED).exists()


def read_fingerprint(directory: Path) -> tuple[str, dict[str, int]]:
  """A complete dataset's fingerprint and how many videos each split has, without its data."""
  content = json.loads((directory / 'fingerprint.json').read_text())
  return content['fingerprint'], content['videos']


def read_asked(directory: Path) -> dict[str, Any]:
  """The arguments that decided what a complete dataset holds; empty where nobody wrote them down."""
  return json.loads((directory / 'fingerprint.json').read_text()).get('asked', {})


def _list(names: Iterable[str]) -> str:
  return ', '.join(sorted(names)) or 'none'
