"""Batches for training and evaluation, with Grain.

A source is a picklable sequence of dicts with at least `video` (the encoded file), `label`, `id`, `num_frames` and
`duration`. The position in the data is one integer, the global step: no iterator state is stored.
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
from mevit_jax.data.sampling import Sampling, draws
from mevit_jax.data.workers import WorkerBatches, record_current_example
from mevit_jax.datasets.reader import Source
from mevit_jax.errors import UserError
from mevit_jax.video.clips import Box, crop_resize, train_box, train_times, view_boxes, view_times
from mevit_jax.video.decode import VideoError, decode

_MAX_REPLACEMENTS = 20  # consecutive unreadable videos for one example before training fails


class Batches(Protocol):
  """Iterator over this process's slice of the batches; `close()` it."""

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Returns itself."""
    ...

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns the next batch."""
    ...

  def close(self) -> None:
    """Stops worker processes."""
    ...


def train_batches(
  source: Source,
  clip: ClipConfig,
  sampling: Sampling,
  *,
  batch_size: int,
  start_step: int = 0,
  rows: slice | None = None,
  workers: int = 0,
) -> Batches:
  """Returns an endless iterator of random clips.

  A batch has video uint8 `b t h w 3`, label int32 `b`, index and used int64 `b`, error str `b`. The same seed and step
  give the same batch for any slice and number of workers. An unreadable video is replaced by another one, chosen by the
  example's own random numbers: `index` is the sampled dataset index, `used` the index that was decoded, and `error` has
  one line per unreadable video ('' if none).

  With `sampling.repeats` = k each sampled video gives k examples: it is decoded once, and they are different crops of
  the same frames. Examples are in blocks of two videos, `a0 b0 a1 b1 ...`, so that neighbors come from different
  videos.

  Args:
    source: the examples.
    clip: clip sampling and crop size.
    sampling: order of the videos and number of examples per video.
    batch_size: global batch size.
    start_step: global step of the first batch.
    rows: this process's slice of the global batch; all of it by default.
    workers: number of worker processes; 0 decodes in threads.

  Raises:
    VideoError: 20 consecutive videos are unreadable.
    UserError: the batch size does not fit, or the source is empty or cannot be read.
  """
  seed, repeats, balance, labels = sampling
  check_batch(batch_size, repeats)
  _require_examples(source)
  pair = 2 if repeats > 1 else 1
  block = pair * repeats  # examples
  start, stop, _ = (rows or slice(None)).indices(batch_size)
  first, last = start // block * pair, -(-stop // block) * pair  # draws within a global batch
  # Random numbers are keyed by the draw's position in the endless stream, independent of process and worker.
  clips = draws(len(source), seed, balance, labels).random_map(_TrainClips(source, clip, repeats))
  clips = _BatchSlice(clips[start_step * batch_size // repeats :], first, last - first, batch_size // repeats)
  picks = [(row // block * pair + row % pair - first, row % block // pair) for row in range(start, stop)]
  return _batches(clips, last - first, source, workers, partial(_collate, picks))


def check_batch(batch_size: int, repeats: int) -> None:
  """Raises UserError if the batch size is not a multiple of the block of repeated examples."""
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
  """Returns an iterator over every example once, in order.

  A batch has video uint8 `b v t h w 3`, label int32 `b`, index int64 `b`, mask bool `b`, id and error str `b`. Views
  are ordered `v = clips crops`. The last batch is padded with examples of mask False, index -1 and label -1. An
  unreadable video is all zeros, and `error` is the reason ('' for the others).

  Args:
    source: the examples.
    clip: clip sampling and crop size.
    clips: clips per video.
    crops: crops per clip.
    batch_size: global batch size.
    rows: this process's slice of the global batch; all of it by default.
    workers: number of worker processes; 0 decodes in threads.

  Raises:
    UserError: the batch size is less than 1, or the source is empty or cannot be read.
  """
  check_batch(batch_size, 1)
  _require_examples(source)
  padded = -(-len(source) // batch_size) * batch_size
  start, stop, _ = (rows or slice(None)).indices(batch_size)
  examples = grain.MapDataset.range(padded).map(_EvalViews(source, clip, clips, crops))
  return _batches(_BatchSlice(examples, start, stop - start, batch_size), stop - start, source, workers)


def _require_examples(source: Source) -> None:
  if len(source) == 0:
    raise UserError('the dataset has no examples')


def _batches(
  examples: grain.MapDataset, count: int, source: Source, workers: int, collate: Callable[[Any], Any] | None = None
) -> Batches:
  """Builds batches of `count` examples in worker processes, or in threads if `workers` is 0."""
  if workers:
    # Batch before distributing: Grain assigns the elements of this dataset to workers in turn.
    batches = examples.batch(count, batch_fn=collate).to_iter_dataset(grain.ReadOptions(0, 0))
    return WorkerBatches(batches, workers, partial(_describe_example, source))
  threads = len(os.sched_getaffinity(0))  # decoding and resizing release the GIL
  # Prefetch two batches, which are decoded while the devices are busy.
  return iter(examples.to_iter_dataset(grain.ReadOptions(threads, 2 * count)).batch(count, batch_fn=collate))


class _BatchSlice(grain.MapDataset):
  """Selects `count` elements from `start` on, out of every `batch_size`."""

  def __init__(self, parent: grain.MapDataset, start: int, count: int, batch_size: int):
    super().__init__(parent)
    self._start, self._count, self._batch_size = start, count, batch_size

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * self._count

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    batch, offset = divmod(index, self._count)
    return self._parent[batch * self._batch_size + self._start + offset]


@dataclass(frozen=True)
class _TrainClips(grain.transforms.RandomMap):
  """Decodes a random clip of an example and crops it; replaces an example whose video is unreadable."""

  source: Source
  clip: ClipConfig
  repeats: int

  def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    sampled, errors = index, []
    for _ in range(_MAX_REPLACEMENTS):
      example = _read(self.source, index)
      try:
        with _named(example):
          video = self._crops(example, rng)  # k t h w 3
      except VideoError as error:
        errors.append(str(error))
        index = int(rng.integers(len(self.source)))
        continue
      return {
        'video': video,
        'label': np.int32(example['label']),
        'index': np.int64(sampled),
        'used': np.int64(index),
        'error': np.str_('\n'.join(errors)),
      }
    raise VideoError(f'{_MAX_REPLACEMENTS} consecutive videos are unreadable: {"; ".join(errors)}')

  def _crops(self, example: Mapping[str, Any], rng: np.random.Generator) -> list[np.ndarray]:
    times = train_times(rng, self.clip, example['duration'], example['num_frames'])
    frames = decode(example['video'], times, example['num_frames'])
    boxes = [train_box(rng, self.clip, *frames[0].shape[:2]) for _ in range(self.repeats)]
    return [_crop(frames, box, self.clip.size) for box in boxes]


def _collate(picks: Sequence[tuple[int, int]], drawn: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Stacks a batch.

  Args:
    picks: (draw, crop) of every example of the batch.
    drawn: the decoded draws, each with all of its crops.
  """
  batch = {name: np.stack([drawn[i][name] for i, _ in picks]) for name in drawn[0] if name != 'video'}
  return {'video': np.stack([drawn[i]['video'][k] for i, k in picks]), **batch}  # b t h w 3


@dataclass(frozen=True)
class _EvalViews(grain.transforms.Map):
  """Decodes all views of an example, ordered `clips crops`; zeros for padding past the end."""

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
    except VideoError as exception:
      error = str(exception)
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
    frames = decode(example['video'], times.ravel(), example['num_frames'])
    height, width = frames[0].shape[:2]
    boxes = view_boxes(self.clip, height, width, self.crops)
    crops = np.stack([_crop(frames, box, self.clip.size) for box in boxes])  # crops clips*t h w 3
    crops = crops.reshape(self.crops, *times.shape, *self.clip.size, 3)  # crops clips t h w 3
    return crops.swapaxes(0, 1).reshape(-1, *crops.shape[2:])  # v t h w 3


def _read(source: Source, index: int) -> Mapping[str, Any]:
  record_current_example(index)
  try:
    return source[index]
  except Exception as error:  # any kind: I/O errors, or a corrupt record
    raise UserError(f'dataset index {index} cannot be read: {_one_line(error)}') from error


def _describe_example(source: Source, index: int) -> str:
  return f"video '{_read(source, index)['id']}'"


@contextlib.contextmanager
def _named(example: Mapping[str, Any]) -> Iterator[None]:
  """Adds the video's id to errors, which may be raised in another process than they are read."""
  name = f"video '{example['id']}'"
  try:
    yield
  except VideoError as error:
    raise VideoError(f'{name}: {error}') from error
  except MemoryError as error:
    raise UserError(f'{name}: not enough memory to decode it; use fewer data.workers') from error
  except Exception as error:
    raise RuntimeError(f'{name}: {_one_line(error)}') from error


def _one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'


def _crop(frames: list[np.ndarray], box: Box, size: tuple[int, int]) -> np.ndarray:
  """Crops `box` from every frame, `t h w 3`; a frame that occurs several times is resized once."""
  unique = {id(frame): frame for frame in frames}
  resized = {key: crop_resize(frame, box, size) for key, frame in unique.items()}
  return np.stack([resized[id(frame)] for frame in frames])  # t h w 3
