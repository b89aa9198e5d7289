"""Prediction of many files, with a CSV, a figure and a labeled video of the predictions."""

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.files import atomic_path
from mevit_jax.inference.batch import PredictionWriter, Throughput
from mevit_jax.inference.predictor import Predictor, VideoPrediction
from mevit_jax.progress import Progress
from mevit_jax.report.predictions import PredictedVideo, clock, clock_digits, draw_figure, label_drawer, segments
from mevit_jax.video.reader import FileReader
from mevit_jax.video.write import write_overlay

MAX_FIGURE_VIDEOS = 12
_FIGURE_FRAMES = 8
_QUIET_SECONDS = 10  # without output, after which progress within a video is shown


@dataclasses.dataclass(frozen=True)
class PredictOptions:
  """Options of `predict_videos`.

  Attributes:
    top: number of classes per prediction in the CSV and the figure.
    window: length of a window in seconds; None predicts entire videos.
    every: seconds between the starts of two windows.
    csv: CSV file to write.
    figure: figure of the predictions to write.
    overlay: video to write, with the labels drawn on it; only for a single video.
  """

  top: int = 5
  window: float | None = None
  every: float | None = None
  csv: Path | None = None
  figure: Path | None = None
  overlay: Path | None = None


def predict_videos(
  videos: dict[str, Path], predictor: Predictor, options: PredictOptions, throughput: Throughput
) -> Generator[tuple[str, VideoPrediction], None, None]:
  """Yields name and predictions of each video in order, and writes the files that the options name.

  Args:
    videos: name -> path.
    predictor: predictor of the checkpoint.
    options: windows and files to write.
    throughput: counts the predicted clips.
  """
  names, progress, shown = list(videos), _WindowProgress(), list[PredictedVideo]()

  def report(views: int, done: int, total: int) -> None:
    throughput.add(views)
    progress(done, total)

  with contextlib.ExitStack() as stack:
    csv_path = stack.enter_context(atomic_path(options.csv or os.devnull))
    csv_file = stack.enter_context(csv_path.open('w', newline=''))
    writer = PredictionWriter(csv_file, options.top)
    paths = [videos[name] for name in names]
    results = predictor.predict_each(paths, options.window, options.every, report=report)
    for result in stack.enter_context(contextlib.closing(results)):
      name = names[result.index]
      progress.finish_video(bool(result.predictions))
      writer.write(name, result)
      yield name, result
      if not result.predictions:
        continue
      if options.figure and len(shown) < MAX_FIGURE_VIDEOS:
        shown.append(PredictedVideo(name, _figure_frames(videos[name]), result.predictions))
      if options.overlay:
        write_overlay(options.overlay, videos[name], _draw_overlay(result))
  if options.figure and shown:
    draw_figure(options.figure, shown, options.top)


def format_text(name: str, result: VideoPrediction, top: int) -> str:
  """Formats the predictions of a video as text: the most probable classes, or the timeline of its windows."""
  if len(result.predictions) == 1:
    return '\n'.join([name, *(f'  {100 * p:5.1f} %  {label}' for label, p in result.predictions[0].top(top))])
  timeline = segments(result.predictions)
  digits = clock_digits([time for segment in timeline for time in (segment.start, segment.end)])
  lines = []
  for segment in timeline:
    start, end = clock(segment.start, digits), clock(segment.end, digits)
    lines.append(f'  {start:>9} - {end:>9}  {100 * segment.probability:5.1f} %  {segment.label}')
  return '\n'.join([f'{name}  {len(result.predictions)} windows', *lines])


def format_json(name: str, result: VideoPrediction, top: int) -> dict[str, Any]:
  """Returns the predictions of a video as a JSON object."""
  predictions = [
    {
      'start': round(prediction.start, 6),
      'end': round(prediction.end, 6),
      'top': [{'label': label, 'probability': p} for label, p in prediction.top(top)],
    }
    for prediction in result.predictions
  ]
  content: dict[str, Any] = {'video': name, 'error': result.error, 'damage': result.damage}
  content = {key: value for key, value in content.items() if value} | {'predictions': predictions}
  if len(predictions) > 1:
    content['timeline'] = [vars(segment) for segment in segments(result.predictions)]
  return content


class _WindowProgress:
  """Shows the progress within a long video, after some time without other output."""

  def __init__(self) -> None:
    self._last_output, self._total = time.monotonic(), 0
    self._progress: Progress | None = None

  def finish_video(self, success: bool) -> None:
    """Ends the progress of a video; the next one follows."""
    if self._progress and success:
      self._progress(self._total, self._total)
    self._last_output, self._progress = time.monotonic(), None

  def __call__(self, done: int, total: int) -> None:
    if self._progress is None and done < total and time.monotonic() - self._last_output > _QUIET_SECONDS:
      self._progress = Progress('windows predicted', sys.stderr)
    if self._progress and done < total:
      self._progress(done, total)
    self._total = total


def _draw_overlay(result: VideoPrediction) -> Callable[[np.ndarray, float], np.ndarray]:
  """Returns the function that draws the labels on a frame; it shows the progress of a long video."""
  draw, start, progress = label_drawer(result.predictions), time.monotonic(), Progress('overlay seconds', sys.stderr)
  total = math.ceil(result.predictions[-1].end)

  def draw_frame(frame: np.ndarray, seconds: float) -> np.ndarray:
    if time.monotonic() - start > _QUIET_SECONDS:
      progress(int(seconds), total)
    return draw(frame, seconds)

  return draw_frame


def _figure_frames(video: Path) -> np.ndarray:
  """Returns frames at equal distances from an entire video, `t h w 3`."""
  reader = FileReader(video)
  times = (np.arange(_FIGURE_FRAMES) + 0.5) * reader.duration / _FIGURE_FRAMES
  return np.stack(list(reader.frames(times)))  # t h w 3
