"""Predictor: the model of a checkpoint with its preprocessing, applied to videos."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mevit_jax.data.threads import map_in_threads
from mevit_jax.errors import UserError
from mevit_jax.evaluation.metrics import ranked
from mevit_jax.evaluation.protocol import averaged
from mevit_jax.models.functional import build_model
from mevit_jax.pretrained.models import open_model
from mevit_jax.training.steps import make_evaluation_step
from mevit_jax.video.clips import RATE
from mevit_jax.video.container import VideoError
from mevit_jax.video.reader import ArrayReader, FileReader, Reader, Span, read_views, spans

# Path of a file, its content, or frames in memory (uint8 `t h w 3`).
Video = str | os.PathLike | bytes | np.ndarray

# Called after every batch with its number of views, and the predicted and total windows of its last video.
Report = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """Prediction for a video, or for a window of it.

  Attributes:
    names: names of all classes.
    probabilities: `c`, float64, averaged over the views as in evaluation.
    logits: `v c`, float32, one row for each view.
    start: start of the video or window in seconds.
    end: end of the video or window in seconds.
  """

  names: tuple[str, ...]
  probabilities: np.ndarray
  logits: np.ndarray
  start: float
  end: float

  def top(self, count: int = 5) -> list[tuple[str, float]]:
    """Returns the most probable classes with their probabilities; ties go to the lowest class."""
    order = ranked(self.probabilities[None], count)[0]
    return [(self.names[k], float(self.probabilities[k])) for k in order]

  @property
  def label(self) -> str:
    """Most probable class."""
    return self.top(1)[0][0]


@dataclasses.dataclass(frozen=True, eq=False)
class VideoPrediction:
  """Predictions for a video in chronological order: one for the entire video, or one for each window.

  Attributes:
    index: index of the video in the list of videos.
    predictions: predictions; none if the video could not be read.
    error: reason why it could not be read, in one line, or ''.
    damage: description of missing or damaged parts, in one line, or ''.
  """

  index: int
  predictions: tuple[Prediction, ...]
  error: str = ''
  damage: str = ''


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
  """Decoded window `number` of the `count` windows of a video, or the error of a video."""

  index: int
  number: int = 0
  count: int = 0
  span: Span = Span(0, 0, 0)
  views: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint8))  # v t h w 3
  error: str = ''
  damage: str = ''


class Predictor:
  """The model of a checkpoint with its preprocessing, on one device. Threads may share it.

  Attributes:
    class_names: names of the classes.
    clip: sampling and cropping of its input frames.
    step: training step of the parameters.
    weights: 'ema' or 'raw' parameters.
  """

  def __init__(
    self,
    model: str | os.PathLike,
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
      model: workdir of a run or of `mevit convert`, a shared model (`mevit export --to=mevit`), a classifier of another
        library whose classes have names, or a name on the hub (`hf://ORG/NAME`), see `pretrained.models.open_model`.
      checkpoint: 'last', 'best' or a step.
      weights: 'ema', 'raw', or 'auto': EMA parameters if there are any.
      clips: clips per video; None is the number in the run's evaluation, and one for a window (for a model of one
        frame, the evaluation's).
      crops: crops per clip; None is the number in the run's evaluation.
      batch_size: videos or windows per batch; smaller batches are padded to a power of two.
      threads: decoding threads, each with a video of its own; None is one per CPU.

    Raises:
      UserError: no such model or checkpoint, or it is damaged, has an unsupported format, or no class names.
    """
    for name, value in (('clips', clips), ('crops', crops), ('batch_size', batch_size), ('threads', threads)):
      if value is not None and value < 1:
        raise UserError(f'{name} must be at least 1, not {value}')
    loaded = open_model(os.fspath(model), checkpoint, weights)
    config = loaded.config
    self.class_names = loaded.class_names
    self.clip, self.step, self.weights = config.clip, loaded.step, loaded.weights
    self._clips, self._crops, self._evaluation = clips, crops or config.evaluation.crops, config.evaluation
    self._batch_size, self._threads = batch_size, threads or len(os.sched_getaffinity(0))
    built = build_model(config.model)
    self._params = built.unstack(loaded.params)
    self._apply = jax.jit(make_evaluation_step(built, loaded.normalization))
    self._lock = threading.Lock()

  def predict(self, video: Video, fps: float | None = None) -> Prediction:
    """Predicts an entire video, with the views of the run's evaluation.

    Args:
      video: path of a file, its content, or frames (uint8 `t h w 3`).
      fps: frame rate of a video that is given as frames.

    Raises:
      VideoError: the file is not a readable video (a UserError).
      OSError: the file cannot be read.
    """
    return self.timeline(video, fps=fps)[0]

  def timeline(
    self, video: Video, window: float | None = None, every: float | None = None, fps: float | None = None
  ) -> tuple[Prediction, ...]:
    """Predicts each window of a video; arguments and errors as in `predict` and `predict_each`."""
    windows = self._read_windows(0, _open(video, fps), *self._window_seconds(window, every))
    predictions = [prediction for _, prediction in self._predict_windows(windows) if prediction]
    return tuple(sorted(predictions, key=lambda prediction: prediction.start))

  def predict_each(
    self,
    videos: Sequence[Video],
    window: float | None = None,
    every: float | None = None,
    fps: float | None = None,
    report: Report = lambda views, done, total: None,
  ) -> Generator[VideoPrediction, None, None]:
    """Yields the predictions for many videos in order; a video that cannot be read has an `error`.

    Threads decode while the device computes, and a batch may hold windows of several videos.

    Args:
      videos: videos as in `predict`.
      window: length of a window in seconds; None predicts entire videos.
      every: seconds between the starts of two windows; None is `window`. With `every` alone a window is as long as a
        clip.
      fps: frame rate of videos that are given as frames.
      report: called after every batch, see `Report`.
    """
    if isinstance(videos, (str, bytes, os.PathLike)):
      raise UserError('predict_each takes a list of videos; predict and timeline take one')
    window, every = self._window_seconds(window, every)

    def read(index: int) -> Iterator[_Window]:
      try:
        yield from self._read_windows(index, _open(videos[index], fps), window, every)
      except (VideoError, OSError) as error:
        yield _Window(index, error=getattr(error, 'strerror', None) or str(error))

    complete, partial, next_index = dict[int, VideoPrediction](), dict[int, list[Prediction]](), 0
    with contextlib.closing(map_in_threads(read, range(len(videos)), self._threads, 2 * self._batch_size)) as windows:
      for item, prediction in self._predict_windows(windows, report):
        predictions = partial.setdefault(item.index, [])
        predictions += [prediction] if prediction else []
        if item.error or len(predictions) == item.count:
          predictions.sort(key=lambda prediction: prediction.start)
          result = () if item.error else tuple(predictions)
          complete[item.index] = VideoPrediction(item.index, result, item.error, item.damage)
          del partial[item.index]
        while next_index in complete:
          yield complete.pop(next_index)
          next_index += 1

  def _window_seconds(self, window: float | None, every: float | None) -> tuple[float | None, float | None]:
    """Checks the length and the interval of windows, and fills in the length if only the interval is given."""
    clip = self.clip
    for name, value in (('window', window), ('every', every)):
      if value is not None and not value > 0:
        raise UserError(f'{name} must be more than 0 seconds, not {value:g}')
    if clip.sampling == 'uniform':
      if every and not window:
        raise UserError('this model samples frames uniformly from a window: give the length of a window in seconds')
      return window, every
    length = clip.frames * clip.stride / RATE
    if window and window < length - clip.stride / RATE:
      raise UserError(f'a window of {window:g} s is shorter than a clip of this model: use at least {length:g} s')
    return window or (length if every else None), every

  def _read_windows(self, index: int, reader: Reader, window: float | None, every: float | None) -> Iterator[_Window]:
    """Yields the decoded windows of a video."""
    clips = self._clips or (1 if window and self.clip.frames > 1 else self._evaluation.clips)
    parts = spans(reader, window, every)
    for number, (span, views) in enumerate(read_views(reader, self.clip, parts, clips, self._crops), 1):
      yield _Window(index, number, len(parts), span, views, damage=reader.damage)

  def _predict_windows(
    self, windows: Iterable[_Window], report: Report = lambda views, done, total: None
  ) -> Iterator[tuple[_Window, Prediction | None]]:
    """Predicts windows in batches; yields each with its prediction, and errors with None."""
    batch: list[_Window] = []
    is_first_batch = True
    for window in windows:
      if window.error:
        yield window, None
        continue
      batch.append(window)
      if len(batch) == self._batch_size:
        yield from self._predict_batch(batch, self._batch_size, report)
        batch, is_first_batch = [], False
    if batch:
      # A second shape is compiled only if no full batch was: a small one for a few videos.
      size = min(self._batch_size, 1 << (len(batch) - 1).bit_length()) if is_first_batch else self._batch_size
      yield from self._predict_batch(batch, size, report)

  def _predict_batch(self, batch: list[_Window], size: int, report: Report) -> Iterator[tuple[_Window, Prediction]]:
    video = np.zeros((size, *batch[0].views.shape), np.uint8)  # b v t h w 3
    for i, window in enumerate(batch):
      video[i] = window.views
    with self._lock:  # concurrent threads would compile twice, and gain nothing on one device
      logits = np.asarray(self._apply(self._params, video))[: len(batch)]  # b v classes
    probabilities = averaged(logits, self._evaluation.average)
    for window, p, view_logits in zip(batch, probabilities, logits, strict=True):
      yield window, Prediction(self.class_names, p, view_logits, window.span.start, window.span.end)
    report(sum(len(window.views) for window in batch), batch[-1].number, batch[-1].count)


def _open(video: Video, fps: float | None) -> Reader:
  if isinstance(video, np.ndarray):
    if fps is None:
      raise UserError('frames in memory have no frame rate: give fps')
    return ArrayReader(video, fps)
  return FileReader(video if isinstance(video, bytes) else Path(video))
