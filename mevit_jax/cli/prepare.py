"""Prepares a dataset: opens every video once, and writes shards that training reads.

  mevit prepare moving_shapes --data_dir=DIR
  mevit prepare video_folder ROOT --data_dir=DIR
  mevit prepare video_folder videos.csv --data_dir=DIR --name=my_videos
  mevit prepare video_folder UCF-101 --lists=ucfTrainTestlist --fold=1 --data_dir=DIR --name=ucf101
  mevit prepare kinetics400 VIDEOS --annotations=CSVS --data_dir=DIR
  mevit prepare something_something_v2 VIDEOS --annotations=JSONS --data_dir=DIR

moving_shapes: draws short videos of moving shapes, to try things out on.

video_folder: your own videos, laid out as ROOT/CLASS/video.mp4 or ROOT/SPLIT/CLASS/video.mp4 (SPLIT
is train, validation or test; val and valid mean validation), or listed in a CSV file with the
columns path, label and, if you like, split; paths start at the CSV's folder. Where no split is
given, every class is split in two. --lists takes a folder with UCF101's or HMDB51's split files.

kinetics400, kinetics600, kinetics700: VIDEOS is a folder of the clips in any layout (class folders,
split folders, flat); CSVS are the official CSV files, or folders with them, separated by commas.

something_something_v2: VIDEOS is the folder of numbered files; JSONS are the official files
(labels, train, validation, test), or folders with them.

Every video is decoded once; those that do not decode, or take longer than --time_limit, are left out
and listed, with the reason, in report.txt and report.json. Where more are missing than --max_missing
or dead than --max_dead allows, it stops.

The dataset is written to DIR/NAME/1.0.0. A run that was stopped or killed goes on where it was: give
the same command again. What is complete is left alone (a shard that was lost is made again); a
command that asks for something else under the same name is refused, unless with --overwrite: that
prepares the dataset again beside the old one, which is there, and read, until the new one is whole
and takes its place. Both must fit on the disk.

On more machines than this one (requirements-beam.txt; all see the same folders under the same names):
  --beam='--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8'
"""

import difflib
import functools
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mevit_jax.datasets import builders, preparation, shards, tasks
from mevit_jax.datasets import reader as datasets
from mevit_jax.datasets.builders import files, kinetics, moving_shapes, report, something_something, video_folder
from mevit_jax.datasets.builders.files import Listing
from mevit_jax.errors import UserError
from mevit_jax.progress import Progress
from mevit_jax.video.transcode import KINDS, Encoding

REQUIRED = ('data_dir',)  # flags


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('data_dir', None, 'Where datasets lie, each in a folder of its own.')
  flags.DEFINE_bool('overwrite', False, 'Prepare again what is already complete, beside it; then take its place.')
  flags.DEFINE_integer('seed', 0, 'Of the videos drawn, or of the split.', lower_bound=0)
  flags.DEFINE_integer('workers', 0, 'Processes; 0: one for each core.', lower_bound=0)
  flags.DEFINE_string('beam', None, 'Do the work on Apache Beam, with these options of its own, not with --workers.')
  flags.DEFINE_string('name', None, "The dataset's name; of video_folder the folder's or file's if not given.")

  flags.DEFINE_float(
    'max_dead', 0.1, 'Stop if more than this share of the videos is dead.', lower_bound=0.0, upper_bound=1.0
  )
  flags.DEFINE_float(
    'max_missing',
    0.2,
    'Stop if more than this share of the videos listed is not there.',
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    'time_limit', 120, 'Seconds to decode a video in: what takes longer is dead; 0: any.', lower_bound=0.0
  )

  flags.DEFINE_enum(
    'encoding',
    None,
    KINDS,
    'How videos are stored: keep their bytes (as video_folder does), or encode them again to be read fast (h264, as the'
    ' others do).',
  )
  flags.DEFINE_integer('short_side', Encoding.short_side, 'Encoded again: at most; 0: as it is.')
  flags.DEFINE_integer('keyframes', Encoding.keyframes, 'Encoded again: frames from one to the next.')
  flags.DEFINE_integer('quality', Encoding.quality, "Encoded again: x264's crf; less is better, and larger.")

  flags.DEFINE_integer('train_videos', 8192, 'moving_shapes: videos to train on.', lower_bound=8)
  flags.DEFINE_integer('validation_videos', 1024, 'moving_shapes: videos to validate on.', lower_bound=8)
  flags.DEFINE_integer('frames', 16, 'moving_shapes: frames of a video (30 a second).', lower_bound=2)
  flags.DEFINE_integer('size', 48, 'moving_shapes: height and width in pixels; even.', lower_bound=16)

  flags.DEFINE_float(
    'validation_fraction',
    0.2,
    'video_folder: how much of each class is for validation, where no split is given.',
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_string('lists', None, "video_folder: a folder with UCF101's or HMDB51's split files.")
  flags.DEFINE_integer('fold', 1, 'video_folder: which of the official splits in --lists.', lower_bound=1)
  flags.DEFINE_list('annotations', None, 'kinetics, something_something_v2: the lists, or folders of them.')


def _moving_shapes(name: str, arguments: Sequence[str]) -> None:
  if arguments:
    raise UserError(f'moving_shapes takes no further argument, but got: {" ".join(arguments)}')
  if flags.FLAGS.size % 2:
    raise UserError(f'--size must be even, for the codec, but is {flags.FLAGS.size}')
  asked = {
    'kind': name,
    'train_videos': flags.FLAGS.train_videos,
    'validation_videos': flags.FLAGS.validation_videos,
    'seed': flags.FLAGS.seed,
    'frames': flags.FLAGS.frames,
    'size': flags.FLAGS.size,
  }
  if _already(name, asked, elsewhere='--data_dir'):
    return
  with shards.place(_directory(name), flags.FLAGS.overwrite) as directory:
    builder = moving_shapes.build(
      directory.parents[1],
      {'train': flags.FLAGS.train_videos, 'validation': flags.FLAGS.validation_videos},
      flags.FLAGS.seed,
      flags.FLAGS.frames,
      flags.FLAGS.size,
    )
    shards.write(builder, _engine(), Progress('videos written'), asked=asked)
  _summary(name, 'configs/demo.py')


def _video_folder(kind: str, arguments: Sequence[str]) -> None:
  if len(arguments) != 1:
    raise UserError('video_folder takes one folder or one CSV file: see --help')
  source = Path(arguments[0]).expanduser()
  name = _name(source)
  encoding = _encoding(flags.FLAGS.encoding or 'keep')
  asked = {'kind': kind, 'source': str(source.resolve()), 'encoding': files.described(encoding)}
  chance = {'seed': flags.FLAGS.seed, 'validation_fraction': flags.FLAGS.validation_fraction}
  if flags.FLAGS.lists is not None:
    asked |= {'lists': str(Path(flags.FLAGS.lists).expanduser().resolve()), 'fold': str(flags.FLAGS.fold)}
  if _already(name, {**asked, **chance}, elsewhere='--name'):
    return
  listing = video_folder.find(source, flags.FLAGS.lists, flags.FLAGS.fold)
  if len(listing.class_names) < 2:
    raise UserError(f'{source} has one class only ({listing.class_names[0]}): there is nothing to tell apart')
  if any(each.split for each in listing.found):  # Nothing is left to chance.
    chance = {}
  _files(name, listing, encoding, {**asked, **chance}, 'configs/video_folder.py', all_classes=True)


def _benchmark(
  find: Callable[[Path, Sequence[Path]], Listing], config: str, kind: str, arguments: Sequence[str]
) -> None:
  """Prepares a dataset that comes with lists of its own."""
  if len(arguments) != 1 or not flags.FLAGS.annotations:
    raise UserError(f'{kind} takes one folder of videos, and --annotations=FILES_OR_FOLDERS: see --help')
  videos, *lists = (Path(path).expanduser() for path in (arguments[0], *flags.FLAGS.annotations))
  name, encoding = _name(Path(kind)), _encoding(flags.FLAGS.encoding or 'h264')
  asked = {
    'kind': kind,
    'source': str(videos.resolve()),
    'annotations': [str(path.resolve()) for path in lists],
    'encoding': files.described(encoding),
  }
  if not _already(name, asked, elsewhere='--name'):
    _files(name, find(videos, lists), encoding, asked, config, all_classes=False)


def _files(
  name: str, listing: Listing, encoding: Encoding, asked: Mapping[str, Any], config: str, all_classes: bool
) -> None:
  options = preparation.Options(
    engine=_engine(),
    progress=Progress,
    max_dead=flags.FLAGS.max_dead,
    max_missing=flags.FLAGS.max_missing,
    encoding=encoding,
    time_limit=flags.FLAGS.time_limit,
    validation_fraction=flags.FLAGS.validation_fraction,
    seed=flags.FLAGS.seed,
    all_classes=all_classes,
  )
  with shards.place(_directory(name), flags.FLAGS.overwrite) as directory:
    summary = preparation.prepare(directory, listing, asked, options)
  print('\n' + report.text(summary, at_most=preparation.SHOWN))
  _summary(name, config)
  print(f'all that was found: {_directory(name) / "report.txt"}')


# Every dataset that this command prepares, and how; each takes its name and the arguments after it.
DATASETS: dict[str, Callable[[str, Sequence[str]], None]] = {
  'moving_shapes': _moving_shapes,
  'video_folder': _video_folder,
  'kinetics400': functools.partial(_benchmark, functools.partial(kinetics.find, classes=400), 'configs/k400.py'),
  'kinetics600': functools.partial(_benchmark, functools.partial(kinetics.find, classes=600), 'configs/k600.py'),
  'kinetics700': functools.partial(_benchmark, functools.partial(kinetics.find, classes=700), 'configs/k600.py'),
  'something_something_v2': functools.partial(_benchmark, something_something.find, 'configs/ssv2.py'),
}


def _name(source: Path) -> str:
  """The dataset's name: --name, or one made of the folder's or the file's."""
  if flags.FLAGS.name is None:
    path = source.resolve()
    name = re.sub(r'[^a-z0-9]+', '_', (path.stem if path.is_file() else path.name).lower())
    name = name.strip('_') or 'videos'
    return name if name[0].isalpha() else f'videos_{name}'
  if not re.fullmatch(r'[A-Za-z][A-Za-z0-9_]*', flags.FLAGS.name):
    raise UserError(f'--name takes letters, digits and _, a letter first; not {flags.FLAGS.name!r}')
  return flags.FLAGS.name


def _encoding(kind: str) -> Encoding:
  return Encoding(kind, flags.FLAGS.short_side, flags.FLAGS.keyframes, flags.FLAGS.quality)


def _data_dir() -> Path:
  return Path(flags.FLAGS.data_dir or '').expanduser()  # never None: the flag is required


def _directory(name: str) -> Path:
  return _data_dir() / name / builders.VERSION


def _engine() -> tasks.Engine:
  if flags.FLAGS.beam is None:
    return functools.partial(tasks.supervise, workers=_workers())
  from mevit_jax.datasets import beam  # only where it is asked for: it may not be installed

  return functools.partial(beam.run, options=shlex.split(flags.FLAGS.beam))


def _workers() -> int:
  return flags.FLAGS.workers or os.cpu_count() or 1


def _already(name: str, asked: Mapping[str, Any], elsewhere: str) -> bool:
  """Says so where the dataset is there and complete, and is not to be made again.

  Args:
    name: of the dataset.
    asked: what decides its content.
    elsewhere: the flag that makes it another dataset.

  Raises:
    UserError: what is there was asked for otherwise.
  """
  directory = _directory(name)
  shards.mend(directory)
  if flags.FLAGS.overwrite or not datasets.is_complete(directory):
    return False
  datasets.check_format(directory)
  before = datasets.read_asked(directory)
  # What was not written down did not matter, or nobody knows.
  other = {key: value for key, value in before.items() if value != asked.get(key)}
  if 'kind' in other:
    other = {'kind': other['kind']}  # Another kind's flags say nothing more.
  if other:
    difference = ', '.join(f'{key} {_said(value)}, not {_said(asked.get(key))}' for key, value in other.items())
    raise UserError(f'{directory} is of {difference}: give {elsewhere} or --overwrite')
  if gone := shards.lost(directory):
    print(f'{directory} has lost {len(gone)} shards ({gone[0]}, ...): making them again')
    return False
  again = 'goes on to prepare' if shards.beside(directory).exists() else 'prepares'
  print(f'{directory} is already complete: nothing to do (--overwrite {again} it again).')
  return True


def _said(value: Any) -> str:
  """What was asked for, as it is said in flags."""
  if isinstance(value, dict):  # an encoding, as `files.described` has it
    return ' '.join(f'{key}={each}' for key, each in value.items()) or 'keep'
  return ','.join(value) if isinstance(value, list) else str(value)


def _summary(name: str, config: str) -> None:
  directory = _directory(name)
  size = sum(path.stat().st_size for path in directory.glob('*.array_record-*'))
  mark, videos = datasets.read_fingerprint(directory)
  counts = ', '.join(f'{count} {split}' for split, count in videos.items())
  print(f'{name}: {counts} videos, {size / 1e6:.1f} MB, in {directory}')
  print(f'fingerprint: {mark}')
  print(
    f'next: python main.py --config={config} --workdir=WORKDIR --config.data.dataset={name}'
    f' --config.data.data_dir={shlex.quote(str(_data_dir()))}'
  )


def main(argv: Sequence[str]) -> None:
  known = ', '.join(DATASETS)
  if len(argv) < 2:
    raise UserError(f'name a dataset to prepare: {known} (--help tells all)')
  name, *arguments = argv[1:]
  if name not in DATASETS:
    near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.4)
    hint = f'; did you mean {near[0]}?' if near else ''
    raise UserError(f'no dataset {name!r} to prepare; known: {known}{hint}')
  DATASETS[name](name, arguments)
