"""Batches for training and for evaluation, with Grain.

A source is any picklable object with `len` and `source[i]`, a dict that holds at least `video` (the
file's bytes), `label`, `id`, `num_frames` and `duration`. Where a batch stands in the run is one
integer, the step: no iterator state is ever stored.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from mevit_jax.data.clips import (
  Box,
  ClipConfig,
  crop_resize,
  train_box,
  train_times,
  view_boxes,
  view_times,
)
from mevit_jax.data.video import VideoError, decode
from mevit_jax.errors import UserError

_DRAWS = 20  # unreadable videos in a row, for one row of a batch, that are replaced and no error


class Source(Protocol):
  """A dataset's examples, by index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def train_batches(
  source: Source,
  clip: ClipConfig,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  rows: slice | None = None,
  workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
  """Endless random clips: video uint8 `r t h w 3`, label int32, index and used int64 `r`.

  `batch_size` is the global one, of which this host makes the `rows`. The same seed and step give
  the same batch for any rows and workers. Each epoch is a new permutation. An unreadable video is
  replaced by another one that the row's own random numbers name: `index` is the dataset index asked
  for, `used` the one given. Raises VideoError where 20 in a row are unreadable. `close()` it.
  """
  _check(source, batch_size)
  examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
  # Random numbers belong to the example's place in the endless stream, whoever makes it.
  examples = examples.random_map(_TrainClip(source, clip))[start_step * batch_size :]
  return _batches(examples, batch_size, rows, workers)


def eval_batches(
  source: Source,
  clip: ClipConfig,
  *,
  clips: int = 1,
  crops: int = 3,
  batch_size: int,
  rows: slice | None = None,
  workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
  """Every example once, in order: video uint8 `r v t h w 3`, label int32, index int64, mask bool, id, error `r`.

  Views are `v = clips crops`. All batches are whole: what fills the last one has mask False, index and label -1. An
  unreadable video is zeros, and its error says why; it is '' for the others.
  """
  _check(source, batch_size)
  padded = -(-len(source) // batch_size) * batch_size
  examples = grain.MapDataset.range(padded).map(_EvalViews(source, clip, clips, crops))
  return _batches(examples, batch_size, rows, workers)


def _check(source: Source, batch_size: int) -> None:
  if len(source) == 0:
    raise UserError('the dataset has no examples')
  if batch_size < 1:
    raise UserError(f'batch_size is at least 1, not {batch_size}')


def _batches(
  examples: grain.MapDataset, batch_size: int, rows: slice | None, workers: int
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
  """This host's rows of each global batch, made by worker processes, or by threads without any."""
  start, stop, _ = (rows or slice(None)).indices(batch_size)
  examples = _HostRows(examples, start, stop - start, batch_size)
  if workers:
    if not flags.FLAGS.is_parsed():  # in a notebook or a test: Grain reads its flags to start them
      flags.FLAGS.mark_as_parsed()
    # Batches before processes: Grain deals what comes out here to the workers in turn.
    batches = examples.batch(stop - start).to_iter_dataset(grain.ReadOptions(0, 0))
    return iter(batches.mp_prefetch(grain.MultiprocessingOptions(workers, 1), worker_init_fn=_end_with_parent))
  threads = len(os.sched_getaffinity(0))  # decoding and resizing let go of Python's lock
  # Two batches ahead: what is made while the devices are busy is there when they are not.
  return iter(examples.to_iter_dataset(grain.ReadOptions(threads, 2 * (stop - start))).batch(stop - start))


def _end_with_parent(index: int, count: int) -> None:
  """Ends this worker when its parent is gone: a parent that was killed cannot tell it to.

  And not before: Ctrl-C and schedulers signal all processes of a run, whose trainer still has a step to finish.
  """
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

  def wait() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


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
class _TrainClip(grain.transforms.RandomMap):
  """A random clip and crop of an example, or of another one where its video is unreadable."""

  source: Source
  clip: ClipConfig

  def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    asked, unreadable = index, []
    for _ in range(_DRAWS):
      example = _read(self.source, index)
      times = train_times(rng, self.clip, example['duration'], example['num_frames'])
      try:
        frames = _decode(example, times)
      except VideoError as error:
        unreadable.append(str(error))
        index = int(rng.integers(len(self.source)))
        continue
      height, width = frames[0].shape[:2]
      box = train_box(rng, self.clip, height, width)
      return {
        'video': _crop(frames, box, self.clip.size),  # t h w 3
        'label': np.int32(example['label']),
        'index': np.int64(asked),
        'used': np.int64(index),
      }
    raise VideoError(f'{_DRAWS} videos in a row are unreadable: {"; ".join(unreadable)}')


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
    frames = _decode(example, times.ravel())
    height, width = frames[0].shape[:2]
    boxes = view_boxes(self.clip, height, width, self.crops)
    crops = np.stack([_crop(frames, box, self.clip.size) for box in boxes])  # crops clips*t h w 3
    crops = crops.reshape(self.crops, *times.shape, *self.clip.size, 3)  # crops clips t h w 3
    return crops.swapaxes(0, 1).reshape(-1, *crops.shape[2:])  # v t h w 3


def _read(source: Source, index: int) -> Mapping[str, Any]:
  with _named(f'dataset index {index}'):
    return source[index]


def _decode(example: Mapping[str, Any], times: np.ndarray) -> list[np.ndarray]:
  with _named(f"video '{example['id']}'"):
    return decode(example['video'], times)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
  """Says what an error is about: it may come out of a worker process, far from its cause."""
  try:
    yield
  except VideoError as error:
    raise VideoError(f'{what}: {error}') from error
  except Exception as error:
    raise RuntimeError(f'{what}: {type(error).__name__}: {error}') from error


def _crop(frames: list[np.ndarray], box: Box, size: tuple[int, int]) -> np.ndarray:
  """The box of every frame, `t h w 3`; a frame that comes again and again is resized once."""
  once = {id(frame): frame for frame in frames}
  resized = {key: crop_resize(frame, box, size) for key, frame in once.items()}
  return np.stack([resized[id(frame)] for frame in frames])  # t h w 3
