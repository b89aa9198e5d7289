"""Prepares a dataset: decodes every video once and writes shards that training reads.

  mevit prepare moving_shapes --data_dir=DIR
  mevit prepare video_folder ROOT --data_dir=DIR
  mevit prepare video_folder videos.csv --data_dir=DIR --name=my_videos
  mevit prepare video_folder UCF-101 --lists=ucfTrainTestlist --fold=1 --data_dir=DIR --name=ucf101
  mevit prepare kinetics400 VIDEOS --annotations=CSVS --data_dir=DIR
  mevit prepare something_something_v2 VIDEOS --annotations=JSONS --data_dir=DIR

moving_shapes: synthetic short videos of moving shapes, for trying things out.

video_folder: your own videos, as ROOT/CLASS/video.mp4 or ROOT/SPLIT/CLASS/video.mp4 (SPLIT is train,
validation or test; val and valid mean validation), or a CSV file with the columns path, label and,
optionally, split; paths are relative to the CSV's folder. Without given splits, every class is split
into train and validation. --lists takes a folder with UCF101's or HMDB51's split files.

kinetics400, kinetics600, kinetics700: VIDEOS is a folder of the clips in any layout (class folders,
split folders, flat); CSVS are the official CSV files, or folders with them, separated by commas.

something_something_v2: VIDEOS is the folder of numbered files; JSONS are the official files
(labels, train, validation, test), or folders with them.

Videos that do not decode, or exceed --time_limit, --max_bytes or --max_pixels, are left out and
listed, with the reason, in report.txt and report.json. Preparation stops if more videos are missing
than --max_missing, or unusable than --max_unusable, allows.

The dataset is written to DIR/NAME/1.0.0. To continue an interrupted run, give the same command again.
A complete dataset is left alone (lost shards are written again), and a command with other arguments
under the same name is refused. --overwrite prepares the dataset again in a staging folder; the old one
stays readable until the new one is complete and replaces it. The disk must have room for both.

On other machines too (pip install apache-beam; all must see the same folders under the same paths):
  --beam='--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8'
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mevit_jax.datasets import catalog, preparation
from mevit_jax.datasets.builders import files, report
from mevit_jax.errors import UserError
from mevit_jax.video.container import MAX_PIXELS
from mevit_jax.video.transcode import KINDS, Encoding

REQUIRED = ('data_dir',)  # flags

_LIMITS = ('max_unusable', 'max_missing', 'time_limit', 'max_bytes', 'max_pixels', 'validation_fraction')
_LARGEST_VIDEO = 2**31 - 2**24  # a serialized example is limited to 2 GiB
_SHAPES = ('train_videos', 'validation_videos', 'frames', 'size')
_REENCODING = ('short_side', 'keyframes', 'quality')
_BENCHMARKS = tuple(kind for kind in catalog.DATASETS if kind not in ('moving_shapes', 'video_folder'))
_USED_BY = {  # flags that only some datasets use
  **dict.fromkeys(_SHAPES, ('moving_shapes',)),
  **dict.fromkeys(('validation_fraction', 'lists', 'fold'), ('video_folder',)),
  'seed': ('moving_shapes', 'video_folder'),
  'annotations': _BENCHMARKS,
  **dict.fromkeys(('encoding', *_REENCODING, *_LIMITS[:-1]), ('video_folder', *_BENCHMARKS)),
}


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('data_dir', None, 'Folder of all datasets.')
  flags.DEFINE_bool('overwrite', False, 'Prepare a complete dataset again, and replace it when done.')
  flags.DEFINE_integer('seed', 0, 'Seed of the drawn videos, or of the split.', lower_bound=0)
  flags.DEFINE_integer('workers', 0, 'Number of worker processes; 0: one per core.', lower_bound=0, upper_bound=4096)
  flags.DEFINE_string('beam', None, 'Run on Apache Beam, with these options, instead of --workers.')
  flags.DEFINE_string('name', None, "Name of the dataset; derived from the folder's or file's name if not given.")
  share: dict[str, Any] = {'lower_bound': 0.0, 'upper_bound': 1.0}
  flags.DEFINE_float('max_unusable', 0.1, 'Largest share of unusable videos; more stop the preparation.', **share)
  flags.DEFINE_float('max_missing', 0.2, 'Largest share of missing videos; more stop the preparation.', **share)
  flags.DEFINE_float(
    'time_limit',
    120,
    'Seconds that decoding a video may take, else it is unusable; 0: no limit.',
    lower_bound=0.0,
    upper_bound=1e6,
  )
  flags.DEFINE_integer(
    'max_bytes',
    files.MAX_BYTES,
    'Bytes of a video file, else it is unusable.',
    lower_bound=1,
    upper_bound=_LARGEST_VIDEO,
  )
  flags.DEFINE_integer(
    'max_pixels',
    MAX_PIXELS,
    'Height x width of a frame, else the video is unusable. Decoding takes 3 bytes per pixel and more.',
    lower_bound=1,
    upper_bound=MAX_PIXELS,
  )
  _define_encoding_flags()
  shapes = {  # default, help, bounds
    'train_videos': (8192, 'number of training videos', 8, 10**6),
    'validation_videos': (1024, 'number of validation videos', 8, 10**6),
    'frames': (16, 'frames per video (30 per second)', 2, 1024),
    'size': (48, 'height and width in pixels; even', 16, 1024),
  }
  for name, (default, text, smallest, largest) in shapes.items():
    flags.DEFINE_integer(name, default, f'moving_shapes: {text}.', lower_bound=smallest, upper_bound=largest)
  flags.DEFINE_float(
    'validation_fraction', 0.2, 'video_folder: validation share of each class, if no splits are given.', **share
  )
  flags.DEFINE_string('lists', None, "video_folder: a folder with UCF101's or HMDB51's split files.")
  flags.DEFINE_integer('fold', 1, 'video_folder: number of the official split in --lists.', lower_bound=1)
  flags.DEFINE_list('annotations', None, 'kinetics, something_something_v2: the lists, or folders of them.')


def _define_encoding_flags() -> None:
  flags.DEFINE_enum(
    'encoding',
    None,
    KINDS,
    'Encoding that videos are stored in: keep (their own bytes; the default of video_folder) or h264 (re-encoded for'
    ' fast reading; the default of the others).',
  )
  flags.DEFINE_integer('short_side', Encoding.short_side, 'h264: largest short side in pixels; 0: unchanged.')
  flags.DEFINE_integer('keyframes', Encoding.keyframes, 'h264: keyframe interval in frames.')
  flags.DEFINE_integer('quality', Encoding.quality, "h264: x264's CRF; lower is better, and larger.")


def main(argv: Sequence[str]) -> None:
  """Prepares the dataset that the arguments name, and prints its report."""
  if len(argv) < 2:
    raise UserError(f'name a dataset to prepare: {", ".join(catalog.DATASETS)} (see --help)')
  request = _read_request()
  _check_flags(argv[1], request)
  result = catalog.prepare(argv[1], argv[2:], request)
  if result is None:
    return
  if result.report is not None:
    print('\n' + report.text(result.report, preparation.MAX_SHOWN))
  print(catalog.describe(result))


def _check_flags(kind: str, request: catalog.Request) -> None:
  """Raises a UserError if a flag was given that has no effect, or that is not a number."""
  given = {name: flags.FLAGS[name].value for name in flags.FLAGS if flags.FLAGS[name].present}
  for name, value in given.items():
    if kind in catalog.DATASETS and kind not in _USED_BY.get(name, (kind,)):
      raise UserError(f'--{name} has no effect on {kind}; leave it out')
    if isinstance(value, float) and math.isnan(value):
      raise UserError(f'--{name} must be a number, not nan')
  unused = [name for name in _REENCODING if name in given]
  if unused and (request.encoding or 'keep') == 'keep' and kind == 'video_folder':
    raise UserError(f'--{unused[0]} has no effect on videos that keep their encoding; give --encoding=h264 too')
  if 'fold' in given and request.split_lists is None:
    raise UserError('--fold has no effect without --lists')


def _read_request() -> catalog.Request:
  values = flags.FLAGS
  return catalog.Request(
    data_dir=Path(values.data_dir or '').expanduser(),  # never None: the flag is required
    executor=catalog.make_executor(values.workers, values.beam),
    name=values.name,
    overwrite=values.overwrite,
    encoding=values.encoding,
    reencoding=Encoding('h264', values.short_side, values.keyframes, values.quality),
    limits={name: values[name].value for name in _LIMITS},
    seed=values.seed,
    shapes={name: values[name].value for name in _SHAPES},
    split_lists=values.lists,
    fold=values.fold,
    annotations=values.annotations or (),
  )
