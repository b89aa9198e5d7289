"""Predicts the classes of videos with a trained model: a workdir, a shared model, or a classifier by name.

  mevit predict clip.mp4 --model=runs/mine
  mevit predict VIDEOS/ 'more/*.webm' --model=runs/mine --csv=labels.csv --figure=labels.png
  mevit predict long.mp4 --model=runs/mine --window=10 --every=5 --overlay=labeled.mp4
  cat clip.mp4 | mevit predict - --model=runs/mine --json
  mevit predict clip.mp4 --model=hf://facebook/timesformer-base-finetuned-k400

The model is a workdir, a shared model (`mevit export --to=mevit`), or a classifier of another library whose classes
have names (a folder or file, or a model of the Hugging Face Hub, which is downloaded); no dataset is needed. Videos are
files, folders (searched recursively), glob patterns, or - for one video from standard input. An entire video is one
prediction, with the views of the run's evaluation; with --window each window is predicted, and a timeline is printed.
Videos that cannot be read, and the speed, are printed to standard error; the exit status is 1 only if no video could be
read. docs/predict.md has the details.
"""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mevit_jax.cli import command
from mevit_jax.errors import UserError
from mevit_jax.inference.batch import Throughput, open_videos
from mevit_jax.inference.predictor import Predictor
from mevit_jax.predict import MAX_FIGURE_VIDEOS, PredictOptions, format_json, format_text, predict_videos

REQUIRED = ('model',)  # flags


def main(argv: Sequence[str]) -> None:
  """Predicts the videos that the arguments name."""
  options, start = flags.FLAGS, time.monotonic()
  if len(argv) < 2:
    raise UserError('give videos: files, folders, glob patterns, or - for standard input; see --help')
  with open_videos(argv[1:]) as videos:
    if options.overlay and len(videos) > 1:
      raise UserError(f'--overlay writes one video, but {len(videos)} were given')
    for name, suffixes in (('csv', ()), ('figure', ('.png', '.svg', '.pdf')), ('overlay', ('.mp4',))):
      command.check_output(name, getattr(options, name), suffixes, videos.values())
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for predictions
      predictor = Predictor(
        options.model,
        options.checkpoint,
        options.weights,
        clips=options.clips,
        crops=options.crops,
        batch_size=options.batch_size,
      )
    throughput = Throughput(start)
    count = _print_predictions(videos, predictor, throughput)
    print(f'{count} of {len(videos)} videos predicted; {throughput}', file=sys.stderr, flush=True)
  if not count:
    sys.exit(1)


def _print_predictions(videos: dict[str, Path], predictor: Predictor, throughput: Throughput) -> int:
  """Prints the predictions of each video as the flags say; returns the number of videos that could be read."""
  options, count = flags.FLAGS, 0
  files = {name: _path(getattr(options, name)) for name in ('csv', 'figure', 'overlay')}
  predict_options = PredictOptions(options.top, options.window, options.every, **files)
  with contextlib.closing(predict_videos(videos, predictor, predict_options, throughput)) as results:
    for name, result in results:
      if options.json:
        print(json.dumps(format_json(name, result, options.top)), flush=True)
      elif result.predictions:
        print(format_text(name, result, options.top), flush=True)
      if result.error or result.damage:
        print(f'{name}: {result.error or result.damage}', file=sys.stderr, flush=True)
      count += bool(result.predictions)
  return count


def _path(name: str | None) -> Path | None:
  return Path(name).expanduser() if name else None


def define_flags() -> None:
  """Defines the flags of this command."""
  command.define_model_flag('Model to predict with')
  flags.DEFINE_string('checkpoint', 'last', "Checkpoint: 'last', 'best' or a step.")
  flags.DEFINE_enum('weights', 'auto', ['auto', 'ema', 'raw'], 'Parameters; auto is EMA if there is any.')
  flags.DEFINE_integer('top', 5, 'Number of classes per prediction.', lower_bound=1)
  flags.DEFINE_bool('json', False, 'Print one line of JSON per video instead of text.')
  flags.DEFINE_string('csv', None, 'CSV file to write, with a row per video or window.')
  flags.DEFINE_string('figure', None, f'Figure to write, of up to {MAX_FIGURE_VIDEOS} videos: .png, .svg or .pdf.')
  flags.DEFINE_string('overlay', None, 'MP4 file to write: the video with its labels, without sound.')
  flags.DEFINE_float('window', None, 'Length of a window in seconds; each window is predicted separately.')
  flags.DEFINE_float('every', None, 'Seconds between the starts of two windows; the length of a window if not set.')
  flags.DEFINE_integer('clips', None, "Clips per video; the evaluation's if not set, and one for a window.")
  flags.DEFINE_integer('crops', None, "Crops per clip; the evaluation's if not set.")
  flags.DEFINE_integer('batch_size', 8, 'Videos or windows per batch.')
