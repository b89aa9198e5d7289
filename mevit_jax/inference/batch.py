"""Prediction of many files: finding videos, a CSV of predictions, and throughput."""

import contextlib
import csv
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from mevit_jax.datasets.builders.lists import SUFFIXES, walk
from mevit_jax.errors import UserError
from mevit_jax.inference.predictor import VideoPrediction

STDIN = 'standard input'


def find_videos(arguments: Sequence[str]) -> dict[str, Path]:
  """Returns name -> path of the files that arguments name: files, folders (sorted by name) and glob patterns.

  Raises:
    UserError: a pattern or folder has no videos. (A missing file is an error of its prediction.)
  """
  videos = dict[str, Path]()
  for argument in arguments:
    path = Path(argument).expanduser()
    if path.is_dir():
      files = [path / name for name in sorted(walk(path)) if Path(name).suffix.lower() in SUFFIXES]
    elif not path.exists() and glob.has_magic(argument):
      files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if not os.path.isdir(file)]
    else:
      files = [path]
    if not files:
      raise UserError(f'no videos in {argument}' if path.is_dir() else f'no files match {argument}')
    videos.update({str(file): file for file in files})
  return videos


@contextlib.contextmanager
def open_videos(arguments: Sequence[str]) -> Iterator[dict[str, Path]]:
  """Yields the videos of `find_videos`; for the argument '-', standard input is copied to a temporary file.

  A copy is needed because a video is read more than once.
  """
  with tempfile.TemporaryDirectory() as folder:
    videos = find_videos([argument for argument in arguments if argument != '-'])
    if '-' in arguments:
      videos[STDIN] = Path(folder) / 'video'
      with videos[STDIN].open('wb') as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    yield videos


class PredictionWriter:
  """Writes a CSV with a row for each prediction, and for each video that could not be read."""

  def __init__(self, file: TextIO, top: int):
    self._write, self._top = csv.writer(file).writerow, top
    self._write(['video', 'start', 'end', 'prediction', 'confidence', 'top', 'error'])

  def write(self, name: str, result: VideoPrediction) -> None:
    """Writes the rows of a video; bytes of its name that are not UTF-8 become escapes."""
    name = os.fsencode(name).decode(errors='backslashreplace')
    for prediction in result.predictions:
      top = prediction.top(self._top)
      label, probability = top[0]
      classes = '|'.join(f'{label}:{p:.4f}' for label, p in top)
      self._write([name, f'{prediction.start:.3f}', f'{prediction.end:.3f}', label, f'{probability:.4f}', classes, ''])
    if result.error:
      self._write([name, '', '', '', '', '', result.error])


class Throughput:
  """Measures the time to the first predictions (cold start) and the clips per second after them.

  Args:
    start: time at which the command started, in seconds of `time.monotonic`.
  """

  def __init__(self, start: float):
    self._loaded = self._first = self._last = time.monotonic()
    self._load_seconds = self._loaded - start
    self._views = self._first_views = 0

  def add(self, views: int) -> None:
    """Counts the views of a batch."""
    self._last = time.monotonic()
    if not self._views:
      self._first, self._first_views = self._last, views
    self._views += views

  def __str__(self) -> str:
    if not self._views:
      return f'checkpoint loaded in {self._load_seconds:.1f} s'
    first = self._first - self._loaded
    text = (
      f'cold start {self._load_seconds + first:.1f} s (checkpoint loaded in {self._load_seconds:.1f} s, '
      f'{self._first_views} clips compiled and predicted in {first:.1f} s)'
    )
    clips, seconds = self._views - self._first_views, self._last - self._first
    if not clips:
      return text
    # Videos are decoded ahead, during the cold start: a rate over less time than that is not the speed.
    rate = f' in {seconds:.1f} s: {clips / seconds:.3g} clips/s' if seconds >= max(1, first) else ''
    return f'{text}; then {clips} clips{rate}'
