"""Batches for training and for evaluation, with Grain.

A source is any picklable object with `len` and `source[i]`, a dict that holds at least `video` (the
file's bytes), `label`, `id`, `num_frames` and `duration`. Where a batch stands in the run is one
integer, the step: no iterator state is ever stored.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grain
import numpy as np

from mevit_jax.config.data import ClipConfig
from mevit_jax.data.sampling import draws
from mevit_jax.data.workers import WorkerBatches, note_reading
from mevit_jax.datasets.reader import Source
from mevit_jax.errors import UserError
from mevit_jax.video.clips import Box, crop_resize, train_box, train_times, view_boxes, view_times
from mevit_jax.video.decode import VideoError, decode

_DRAWS = 20  # unreadable videos in a row, for one row of a batch, that are replaced and no error


class Batches(Protocol):
  """An iterator over batches, this host's rows of each; `close()` it."""

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

  def __next__(self) -> dict[str, np.ndarray]: ...

  def close(self) -> None: ...


def train_batches(
  source: Source,
  clip: ClipConfig,
  *,
  batch_size: int,
  seed: int,
  repeats: int = 1,
  balance: float = 0.0,
  labels: np.ndarray | None = None,
  start_step: int = 0,
  rows: slice | None = None,
  workers: int = 0,
) -> Batches:
  """Endless random clips: video uint8 `r t h w 3`, label int32, index and used int64, error `r`.

  `batch_size` is the global one, of which this host makes the `rows`. The same seed and step give
  the same batch for any rows and workers. Each epoch is a new permutation; for `balance` and `labels` see
  `sampling.draws`. An unreadable video is replaced by another one that the row's own random numbers name: `index` is
  the dataset index asked for, `used` the one given, and `error` says why, one line a video; it is '' for the others.

  With `repeats` = k a video that is drawn gives k rows: it is decoded once, and each row is another crop of the same
  frames. Rows stand in blocks of two videos, `a0 b0 a1 b1 ...`: neighbours are of different videos.

  Raises VideoError where 20 in a row are unreadable. `close()` it.
  """
  check_batch(batch_size, repeats)
  _check(source)
  pair = 2 if repeats > 1 else 1
  block = pair * repeats  # rows
  start, stop, _ = (rows or slice(None)).indices(batch_size)
  first, last = start // block * pair, -(-stop // block) * pair  # the draws that these rows are of
  # Random numbers belong to the draw's place in the endless stream, whoever makes it.
  clips = draws(len(source), seed, balance, labels).random_map(_TrainClips(source, clip, repeats))
  clips = _HostRows(clips[start_step * batch_size // repeats :], first, last - first, batch_size // repeats)
  picks = [(row // block * pair + row % pair - first, row % block // pair) for row in range(start, stop)]
  return _batches(clips, last - first, source, workers, partial(_collate, picks))


def check_batch(batch_size: int, repeats: int) -> None:
  """Raises a UserError for a batch that does not hold whole blocks of rows."""
  if batch_size < 1 or repeats < 1:
    raise UserError(f'batch_size and data.repeated_augmentation must be at least 1, not {batch_size} and {repeats}')
  if repeats > 1 and batch_size % (2 * repeats):
    raise UserError(
      f'training.batch_size {batch_size} is not divisible by {2 * repeats} '
      f'(2 videos x data.repeated_augmentation {repeats})'
    )


def eval_batches(
  source: Source,
  clip: ClipConfig,
  *,
  clips: int = 1,
  crops: int = 3,
  batch_size: int,
  rows: slice | None = None,
  workers: int = 0,
) -> Batches:
  """Every example once, in order: video uint8 `r v t h w 3`, label int32, index int64, mask bool, id, error `r`.

  Views are `v = clips crops`. All batches are whole: what fills the last one has mask False, index and label -1. An
  unreadable video is zeros, and its error says why; it is '' for the others.
  """
  check_batch(batch_size, 1)
  _check(source)
  padded = -(-len(source) // batch_size) * batch_size
  start, stop, _ = (rows or slice(None)).indices(batch_size)
  examples = grain.MapDataset.range(padded).map(_EvalViews(source, clip, clips, crops))
  return _batches(_HostRows(examples, start, stop - start, batch_size), stop - start, source, workers)


def _check(source: Source) -> None:
  if len(source) == 0:
    raise UserError('the dataset has no examples')


def _batches(
  examples: grain.MapDataset, count: int, source: Source, workers: int, collate: Callable[[Any], Any] | None = None
) -> Batches:
  """Batches of `count` examples, made by worker processes, or by threads without any."""
  if workers:
    # Batches before processes: Grain deals what comes out here to the workers in turn.
    batches = examples.batch(count, batch_fn=collate).to_iter_dataset(grain.ReadOptions(0, 0))
    return WorkerBatches(batches, workers, partial(_name, source))
  threads = len(os.sched_getaffinity(0))  # decoding and resizing let go of Python's lock
  # Two batches ahead: what is made while the devices are busy is there when they are not.
  return iter(examples.to_iter_dataset(grain.ReadOptions(threads, 2 * count)).batch(count, batch_fn=collate))


class _HostRows(grain.MapDataset):
  """`count` rows from `start` on, of every `batch_size`."""

  def __init__(self, parent: grain.MapDataset, start: int, count: int, batch_size: int):
    super().__init__(parent)
    self._start, self._count, self._batch_size = start, count, batch_size

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * self._count

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    batch, row = divmod(index, self._count)
    return self._parent[batch * self._batch_size + self._start + row]


@dataclass(frozen=True)
class _TrainClips(grain.transforms.RandomMap):
  """Random crops of a random clip of an example, or of another one where its video is unreadable."""

  source: Source
  clip: ClipConfig
  repeats: int

  def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    asked, unreadable = index, []
    for _ in range(_DRAWS):
      example = _read(self.source, index)
      try:
        with _named(example):
          video = self._crops(example, rng)  # k t h w 3
      except VideoError as error:
        unreadable.append(str(error))
        index = int(rng.integers(len(self.source)))
        continue
      return {
        'video': video,
        'label': np.int32(example['label']),
        'index': np.int64(asked),
        'used': np.int64(index),
        'error': np.str_('\n'.join(unreadable)),
      }
    raise VideoError(f'{_DRAWS} videos in a row are unreadable: {"; ".join(unreadable)}')

  def _crops(self, example: Mapping[str, Any], rng: np.random.Generator) -> list[np.ndarray]:
    frames = decode(example['video'], train_times(rng, self.clip, example['duration'], example['num_frames']))
    boxes = [train_box(rng, self.clip, *frames[0].shape[:2]) for _ in range(self.repeats)]
    return [_crop(frames, box, self.clip.size) for box in boxes]


def _collate(picks: Sequence[tuple[int, int]], drawn: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
  """The rows of a batch: of which draw, and which of its crops."""
  batch = {name: np.stack([drawn[i][name] for i, _ in picks]) for name in drawn[0] if name != 'video'}
  return {'video': np.stack([drawn[i]['video'][k] for i, k in picks]), **batch}  # r t h w 3


@dataclass(frozen=True)
class _EvalViews(grain.transforms.Map):
  """All views of an example, a clip's crops next to each other; zeros past the end."""

  source: Source
  clip: ClipConfig
  clips: int
  crops: int

  def map(self, index: int) -> dict[str, Any]:
    shape = self.clips * self.crops, self.clip.frames, *self.clip.size, 3
    padding = index >= len(self.source)
    example: Mapping[str, Any] = {'id': '', 'label': -1} if padding else _read(self.source, index)
    views, error = np.zeros(shape, np.uint8), ''
    try:
      with _named(example):
        views = views if padding else self._views(example)
    except VideoError as unreadable:
      error = str(unreadable)
    return {
      'video': views,  # v t h w 3
      'label': np.int32(example['label']),
      'index': np.int64(-1 if padding else index),
      'mask': np.bool_(not padding),
      'id': np.str_(example['id']),
      'error': np.str_(error),
    }

  def _views(self, example: Mapping[str, Any]) -> np.ndarray:
    times = view_times(self.clip, example['duration'], example['num_frames'], self.clips)
    frames = decode(example['video'], times.ravel())
    height, width = frames[0].shape[:2]
    boxes = view_boxes(self.clip, height, width, self.crops)
    crops = np.stack([_crop(frames, box, self.clip.size) for box in boxes])  # crops clips*t h w 3
    crops = crops.reshape(self.crops, *times.shape, *self.clip.size, 3)  # crops clips t h w 3
    return crops.swapaxes(0, 1).reshape(-1, *crops.shape[2:])  # v t h w 3


def _read(source: Source, index: int) -> Mapping[str, Any]:
  note_reading(index)
  try:
    return source[index]
  except Exception as error:  # of whatever kind: it is the disk, or what stands there
    raise UserError(f'dataset index {index} cannot be read: {_line(error)}') from error


def _name(source: Source, index: int) -> str:
  return f"video '{_read(source, index)['id']}'"


@contextlib.contextmanager
def _named(example: Mapping[str, Any]) -> Iterator[None]:
  """Says which video an error is about: it may come out of a worker process, far from its cause."""
  what = f"video '{example['id']}'"
  try:
    yield
  except VideoError as error:
    raise VideoError(f'{what}: {error}') from error
  except MemoryError as error:
    raise UserError(f'{what}: there is no memory to decode it; fewer data.workers need less') from error
  except Exception as error:
    raise RuntimeError(f'{what}: {_line(error)}') from error


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'


def _crop(frames: list[np.ndarray], box: Box, size: tuple[int, int]) -> np.ndarray:
  """The box of every frame, `t h w 3`; a frame that comes again and again is resized once."""
  once = {id(frame): frame for frame in frames}
  resized = {key: crop_resize(frame, box, size) for key, frame in once.items()}
  return np.stack([resized[id(frame)] for frame in frames])  # t h w 3
