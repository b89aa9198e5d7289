"""Says what is in videos, by a workdir's checkpoint.

  mevit predict clip.mp4 --workdir=runs/mine
  mevit predict VIDEOS/ 'more/*.webm' --workdir=runs/mine --csv=labels.csv --figure=labels.png
  mevit predict long.mp4 --workdir=runs/mine --window=10 --every=5 --overlay=labelled.mp4
  cat clip.mp4 | mevit predict - --workdir=runs/mine --json

Videos are files, folders (all videos below them), patterns, or - for one from standard input. All of a video is one
prediction, with the views that the run was evaluated with; with --window each so many seconds are, and a timeline is
printed. What cannot be read is named on standard error, where the speed is said too; the exit status is 1 only if
nothing could be read. docs/predict.md says more.
"""

import contextlib
import csv
import glob
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from absl import flags

from mevit_jax.cli import command
from mevit_jax.datasets.builders.lists import SUFFIXES, walk
from mevit_jax.errors import UserError
from mevit_jax.inference.predictor import Predicted, Predictor
from mevit_jax.report.predictions import PredictedVideo, clock, draw_figure, label_drawer, segments
from mevit_jax.video.reader import FileReader
from mevit_jax.video.write import write_overlay

REQUIRED = ('workdir',)  # flags

_FIGURE_VIDEOS, _FIGURE_FRAMES = 12, 8
_STDIN = 'standard input'
_SILENT = 10  # seconds; then it says how far it is


def find_videos(arguments: Sequence[str]) -> dict[str, Path]:
  """The files that arguments mean, by the names they are spoken of; each once, folders in the order of names.

  Raises:
    UserError: a pattern or folder that holds none. (A file that is not there is named when it is its turn.)
  """
  found = dict[str, Path]()
  for argument in arguments:
    path = Path(argument).expanduser()
    if path.is_dir():
      files = [path / name for name in sorted(walk(path)) if Path(name).suffix.lower() in SUFFIXES]
    elif not path.exists() and glob.has_magic(argument):
      files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if not os.path.isdir(file)]
    else:
      files = [path]
    if not files:
      raise UserError(f'no videos in {argument}' if path.is_dir() else f'no file is like {argument}')
    found.update({str(file): file for file in files})
  return found


@contextlib.contextmanager
def _named_files(arguments: Sequence[str]) -> Iterator[dict[str, Path]]:
  """What `find_videos` finds; standard input is a file meanwhile: a video is read more than once."""
  with tempfile.TemporaryDirectory() as folder:
    found = find_videos([argument for argument in arguments if argument != '-'])
    if '-' in arguments:
      found[_STDIN] = Path(folder) / 'video'
      with found[_STDIN].open('wb') as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    yield found


def in_words(name: str, found: Predicted, top: int) -> str:
  """A video's predictions as text: the likeliest classes, or the timeline."""
  if len(found.predictions) == 1:
    return '\n'.join([name, *(f'  {100 * p:5.1f} %  {label}' for label, p in found.predictions[0].top(top))])
  lines = [
    f'  {clock(part.start):>9} - {clock(part.end):>9}  {100 * part.probability:5.1f} %  {part.label}'
    for part in segments(found.predictions)
  ]
  return '\n'.join([f'{name}  {len(found.predictions)} windows', *lines])


def as_json(name: str, found: Predicted, top: int) -> dict[str, Any]:
  """A video's predictions as what JSON can hold."""
  windows = [
    {
      'start': round(part.start, 6),
      'end': round(part.end, 6),
      'top': [{'label': label, 'probability': p} for label, p in part.top(top)],
    }
    for part in found.predictions
  ]
  notes = {key: value for key, value in (('error', found.error), ('damage', found.damage)) if value}
  timeline = [vars(part) for part in segments(found.predictions)] if len(windows) > 1 else []
  return {'video': name, **notes, 'predictions': windows, **({'timeline': timeline} if timeline else {})}


class _Table:
  """A CSV with a line a prediction, or a video that could not be read."""

  def __init__(self, file: TextIO, top: int):
    self._write, self._top = csv.writer(file).writerow, top
    self._write(['video', 'start', 'end', 'prediction', 'confidence', 'top', 'error'])

  def add(self, name: str, found: Predicted) -> None:
    for part in found.predictions:
      top = part.top(self._top)
      likeliest = '|'.join(f'{label}:{p:.4f}' for label, p in top)
      self._write([name, f'{part.start:.3f}', f'{part.end:.3f}', top[0][0], f'{top[0][1]:.4f}', likeliest, ''])
    if found.error:
      self._write([name, '', '', '', '', '', found.error])


class _Clock:
  """How long it took to the first predictions, and how fast it is from then on; says how far a long video is."""

  def __init__(self, ready: float):
    self._begun = time.monotonic()
    self._ready, self._first, self._last, self.said = ready, 0.0, self._begun, self._begun
    self._views, self._first_views = 0, 0

  def __call__(self, views: int, place: int, count: int) -> None:
    """After a batch; see `Predictor.predict_each`."""
    self._last = time.monotonic()
    if self._last - self.said > _SILENT and place < count:
      print(f'{place} of {count} windows', file=sys.stderr, flush=True)
      self.said = self._last
    self._views += views
    if not self._first:
      self._first, self._first_views = self._last - self._begun, views

  def __str__(self) -> str:
    if not self._views:
      return f'the checkpoint was there after {self._ready:.1f} s'
    text = f'cold start {self._ready + self._first:.1f} s (until the checkpoint was there {self._ready:.1f} s, '
    text += f'then {self._first:.1f} s to compile and predict {self._first_views} clips)'
    later, seconds = self._views - self._first_views, self._last - self._begun - self._first
    return text + (f'; then {later} clips in {seconds:.1f} s: {later / seconds:.3g} clips/s' if later else '')


def predict(videos: dict[str, Path], predictor: Predictor, ready: float = 0.0) -> int:
  """Predicts files and writes what the flags ask for; returns how many could be read.

  Args:
    videos: by name.
    predictor: of the checkpoint.
    ready: the seconds from the process' start to now.
  """
  options, speed = flags.FLAGS, _Clock(ready)
  names, read, shown = list(videos), 0, list[PredictedVideo]()
  with contextlib.ExitStack() as stack:
    table = _Table(stack.enter_context(_path(options.csv or os.devnull).open('w', newline='')), options.top)
    following = predictor.predict_each([videos[name] for name in names], options.window, options.every, report=speed)
    for found in stack.enter_context(contextlib.closing(following)):
      name, speed.said = names[found.index], time.monotonic()
      table.add(name, found)
      if options.json:
        print(json.dumps(as_json(name, found, options.top)), flush=True)
      elif found.predictions:
        print(in_words(name, found, options.top), flush=True)
      if found.error or found.damage:
        print(f'{name}: {found.error or found.damage}', file=sys.stderr, flush=True)
      if not found.predictions:
        continue
      read += 1
      if options.figure and len(shown) < _FIGURE_VIDEOS:
        shown.append(PredictedVideo(name, _frames(videos[name]), found.predictions))
      if options.overlay:
        write_overlay(_path(options.overlay), videos[name], _draws(found))
  if shown:
    draw_figure(_path(options.figure), shown)
  print(f'{read} of {len(names)} videos predicted; {speed}', file=sys.stderr, flush=True)
  return read


def _draws(found: Predicted) -> Callable[[np.ndarray, float], np.ndarray]:
  """What `write_overlay` draws frames with; says now and then how far it is."""
  draw, said = label_drawer(found.predictions), time.monotonic()
  end = clock(found.predictions[-1].end)

  def drawn(frame: np.ndarray, seconds: float) -> np.ndarray:
    nonlocal said
    if time.monotonic() - said > _SILENT:
      said = time.monotonic()
      print(f'overlay: {clock(seconds)} of {end}', file=sys.stderr, flush=True)
    return draw(frame, seconds)

  return drawn


def _path(name: str) -> Path:
  return Path(name).expanduser()


def _frames(video: Path) -> np.ndarray:
  """Frames from all of a video, `t h w 3`."""
  reader = FileReader(video)
  times = (np.arange(_FIGURE_FRAMES) + 0.5) * reader.duration / _FIGURE_FRAMES
  return np.stack(list(reader.frames(times)))  # t h w 3


def _since_start() -> float:
  """Seconds since this process began, libraries' imports and all."""
  ticks = int(Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
  return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')


def main(argv: Sequence[str]) -> None:
  """Predicts what the arguments name."""
  options = flags.FLAGS
  if len(argv) < 2:
    raise UserError('name videos: files, folders, patterns, or - for standard input (--help tells all)')
  with _named_files(argv[1:]) as videos:
    if options.overlay and len(videos) > 1:
      raise UserError(f'--overlay writes one video, and {len(videos)} were given')
    for name, suffixes in (('csv', ()), ('figure', ('.png', '.svg', '.pdf')), ('overlay', ('.mp4',))):
      command.check_output(name, getattr(options, name), suffixes, videos.values())
    with contextlib.redirect_stdout(sys.stderr):  # what is said of checkpoints is no prediction
      predictor = Predictor(
        options.workdir,
        options.checkpoint,
        options.weights,
        clips=options.clips,
        crops=options.crops,
        batch_size=options.batch_size,
      )
    if not predict(videos, predictor, _since_start()):
      sys.exit(1)


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('workdir', None, 'Whose checkpoint says what is in the videos.')
  flags.DEFINE_string('checkpoint', 'last', "The 'last', the 'best' or a step.")
  flags.DEFINE_enum('weights', 'auto', ['auto', 'ema', 'raw'], 'auto is the running mean where there is one.')
  flags.DEFINE_integer('top', 5, 'How many classes are told of each video.', lower_bound=1)
  flags.DEFINE_bool('json', False, 'A line of JSON a video instead of text.')
  flags.DEFINE_string('csv', None, 'A table to write: a line a video, or a window.')
  flags.DEFINE_string('figure', None, f'A picture to write, of up to {_FIGURE_VIDEOS} videos: .png, .svg or .pdf.')
  flags.DEFINE_string('overlay', None, 'An mp4 to write: the one video, with its labels, without sound.')
  flags.DEFINE_float('window', None, 'Predict every so many seconds on their own.')
  flags.DEFINE_float('every', None, 'Seconds from one window to the next; windows lie side by side if not set.')
  flags.DEFINE_integer('clips', None, "Views in time; the evaluation's if not set, and one of a window.")
  flags.DEFINE_integer('crops', None, "Crops of each clip; the evaluation's if not set.")
  flags.DEFINE_integer('batch_size', 8, 'Videos or windows at once.')
