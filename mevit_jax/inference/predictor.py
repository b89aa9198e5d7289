"""A trained model as an object that takes videos and gives labels."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.data.threads import map_in_threads
from mevit_jax.errors import UserError
from mevit_jax.evaluation.metrics import ranked
from mevit_jax.evaluation.protocol import averaged
from mevit_jax.models.functional import build_model
from mevit_jax.training.steps import make_evaluation_step
from mevit_jax.video.clips import RATE
from mevit_jax.video.container import VideoError
from mevit_jax.video.reader import ArrayReader, FileReader, Reader, Span, read_views, spans

# A file's path, its bytes, or frames in memory: uint8 `t h w 3`.
Video = str | os.PathLike | bytes | np.ndarray

# Told after every batch: its views, and how many of its last video's how many windows are done.
Report = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """What the model says of a video, or of a window of it.

  Attributes:
    names: of all classes.
    probabilities: `c`, float64: averaged over the views as evaluation averages them.
    logits: `v c`, float32: of every view.
    start, end: of the video or window, in seconds.
  """

  names: tuple[str, ...]
  probabilities: np.ndarray
  logits: np.ndarray
  start: float
  end: float

  def top(self, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest classes with their probabilities; ties go to the lowest class."""
    order = ranked(self.probabilities[None], count)[0]
    return [(self.names[k], float(self.probabilities[k])) for k in order]

  @property
  def label(self) -> str:
    """The likeliest class."""
    return self.top(1)[0][0]


@dataclasses.dataclass(frozen=True, eq=False)
class Predicted:
  """A video's predictions in the order of time: one of all of it, or one a window.

  Attributes:
    index: of the video in what was asked for.
    predictions: none if it could not be read.
    error: why it could not be read, in one line, or ''.
    damage: what of it was not there, in one line, or ''.
  """

  index: int
  predictions: tuple[Prediction, ...]
  error: str = ''
  damage: str = ''


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
  """The views `v t h w 3` of one of a video's `count` spans, the `place`-th to come, or why there are none."""

  index: int
  place: int = 0
  count: int = 0
  span: Span = Span(0, 0, 0)
  views: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint8))
  error: str = ''
  damage: str = ''


class Predictor:
  """A checkpoint's model with its own preprocessing, on one device. Threads may share it.

  Attributes:
    class_names: of the classes.
    clip: which frames it takes.
    step: the updates that its params have seen.
    weights: 'ema' (their running mean) or 'raw'.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    checkpoint: str = 'last',
    weights: str = 'auto',
    *,
    clips: int | None = None,
    crops: int | None = None,
    batch_size: int = 8,
    threads: int | None = None,
  ):
    """Loads a checkpoint; the model is compiled when first used.

    Args:
      workdir: of a training run, or of `mevit convert`; or what `mevit export --to=mevit` has written.
      checkpoint: the 'last', the 'best' or a step.
      weights: 'ema', 'raw', or 'auto': the running mean where there is one.
      clips: views in time; None has as many as the run was evaluated with, and one of a window.
      crops: of each clip; None has as many as the run was evaluated with.
      batch_size: videos or windows that the device takes at once; fewer are padded to a power of two.
      threads: that decode, one a video; None is one a CPU.

    Raises:
      UserError: no such workdir or checkpoint, or it is damaged or of another version.
    """
    for name, value in (('clips', clips), ('crops', crops), ('batch_size', batch_size), ('threads', threads)):
      if value is not None and value < 1:
        raise UserError(f'{name} must be at least 1, not {value}')
    loaded = load_checkpoint(workdir, checkpoint, weights)
    recipe = loaded.config
    self.class_names = loaded.class_names
    self.clip, self.step, self.weights = recipe.clip, loaded.step, loaded.weights
    self._clips, self._crops, self._evaluation = clips, crops or recipe.evaluation.crops, recipe.evaluation
    self._batch_size, self._threads = batch_size, threads or len(os.sched_getaffinity(0))
    model = build_model(recipe.model)
    self._params = model.unstack(loaded.params)
    self._apply = jax.jit(make_evaluation_step(model, loaded.normalization))
    self._lock = threading.Lock()

  def predict(self, video: Video, fps: float | None = None) -> Prediction:
    """What the model says of all of a video; its views and their average are those of evaluation.

    Args:
      video: a file's path, its bytes, or frames uint8 `t h w 3`.
      fps: of frames.

    Raises:
      VideoError: it cannot be read; a UserError, as all of its kind.
      OSError: likewise.
    """
    return self.timeline(video, fps=fps)[0]

  def timeline(
    self, video: Video, window: float | None = None, every: float | None = None, fps: float | None = None
  ) -> tuple[Prediction, ...]:
    """What the model says of each window of a video; see `predict` and `predict_each`."""
    rows = self._rows(0, _open(video, fps), *self._window(window, every))
    predictions = [prediction for _, prediction in self._predicted(rows) if prediction]
    return tuple(sorted(predictions, key=lambda part: part.start))

  def predict_each(
    self,
    videos: Sequence[Video],
    window: float | None = None,
    every: float | None = None,
    fps: float | None = None,
    report: Report = lambda views, place, count: None,
  ) -> Generator[Predicted, None, None]:
    """Predicts many videos, in their order; one that cannot be read has an `error`, and the rest goes on.

    Threads decode while the device works, and a batch may hold windows of several videos.

    Args:
      videos: see `predict`.
      window: seconds, or None for all of a video at once.
      every: seconds from one window's start to the next one's; None has them side by side. With `every` alone a window
        is as long as a clip.
      fps: of videos that are frames.
      report: called after every batch, see `Report`.
    """
    if isinstance(videos, (str, bytes, os.PathLike)):
      raise UserError('predict_each takes a list of videos; predict and timeline take one')
    asked = self._window(window, every)

    def read(index: int) -> Iterator[_Row]:
      try:
        yield from self._rows(index, _open(videos[index], fps), *asked)
      except (VideoError, OSError) as error:
        yield _Row(index, error=getattr(error, 'strerror', None) or str(error))

    done, parts, following = dict[int, Predicted](), dict[int, list[Prediction]](), 0
    with contextlib.closing(map_in_threads(read, range(len(videos)), self._threads, 2 * self._batch_size)) as rows:
      for row, prediction in self._predicted(rows, report):
        found = parts.setdefault(row.index, [])
        found += [prediction] if prediction else []
        if row.error or len(found) == row.count:
          found.sort(key=lambda part: part.start)
          done[row.index] = Predicted(row.index, () if row.error else tuple(found), row.error, row.damage)
          del parts[row.index]
        while following in done:
          yield done.pop(following)
          following += 1

  def _window(self, window: float | None, every: float | None) -> tuple[float | None, float | None]:
    """Checks what is asked for, and fills in what is not."""
    clip = self.clip
    for name, value in (('window', window), ('every', every)):
      if value is not None and not value > 0:
        raise UserError(f'{name} must be more than 0 seconds, not {value:g}')
    if clip.sampling == 'uniform':
      if every and not window:
        raise UserError('this model takes frames from all of a video, or of a window: say how long one is, in seconds')
      return window, every
    length = clip.frames * clip.stride / RATE
    if window and window < length - clip.stride / RATE:
      raise UserError(f'a window of {window:g} s is shorter than a clip of this model: {length:g} s')
    return window or (length if every else None), every

  def _rows(self, index: int, reader: Reader, window: float | None, every: float | None) -> Iterator[_Row]:
    """The views of a video's windows."""
    clips = self._clips or (1 if window else self._evaluation.clips)
    parts = spans(reader, window, every)
    for place, (span, views) in enumerate(read_views(reader, self.clip, parts, clips, self._crops), 1):
      yield _Row(index, place, len(parts), span, views, damage=reader.damage)

  def _predicted(
    self, rows: Iterable[_Row], report: Report = lambda views, place, count: None
  ) -> Iterator[tuple[_Row, Prediction | None]]:
    """Each row with its prediction, in batches; rows without views come through as they are."""
    batch: list[_Row] = []
    several = False
    for row in rows:
      if row.error:
        yield row, None
        continue
      batch.append(row)
      if len(batch) == self._batch_size:
        yield from self._predict_batch(batch, self._batch_size, report)
        batch, several = [], True
    if batch:
      # One shape is compiled for many videos, and a small one for a few.
      size = self._batch_size if several else min(self._batch_size, 1 << (len(batch) - 1).bit_length())
      yield from self._predict_batch(batch, size, report)

  def _predict_batch(self, batch: list[_Row], size: int, report: Report) -> Iterator[tuple[_Row, Prediction]]:
    video = np.zeros((size, *batch[0].views.shape), np.uint8)  # b v t h w 3
    for place, row in enumerate(batch):
      video[place] = row.views
    with self._lock:  # threads would compile the same twice, and gain nothing on one device
      logits = np.asarray(self._apply(self._params, video))[: len(batch)]  # b v classes
    probabilities = averaged(logits, self._evaluation.average)
    for row, p, each in zip(batch, probabilities, logits, strict=True):
      yield row, Prediction(self.class_names, p, each, row.span.start, row.span.end)
    report(sum(len(row.views) for row in batch), batch[-1].place, batch[-1].count)


def _open(video: Video, fps: float | None) -> Reader:
  if isinstance(video, np.ndarray):
    if fps is None:
      raise UserError('frames in memory have no rate of their own: give fps')
    return ArrayReader(video, fps)
  return FileReader(video if isinstance(video, bytes) else Path(video))
