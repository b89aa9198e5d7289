"""Prepares a dataset: opens every video once, and writes shards that training reads.

  python -m mevit_jax.prepare moving_shapes --data_dir=DIR
  python -m mevit_jax.prepare video_folder ROOT --data_dir=DIR
  python -m mevit_jax.prepare video_folder videos.csv --data_dir=DIR --name=my_videos

moving_shapes: draws short videos of moving shapes, to try things out on.

video_folder: your own videos, laid out as ROOT/CLASS/video.mp4 or ROOT/SPLIT/CLASS/video.mp4 (SPLIT
is train, validation or test; val and valid mean validation), or listed in a CSV file with the
columns path, label and, if you like, split; paths start at the CSV's folder. Where no split is
given, every class is split in two. Every video is decoded once; those that do not decode are left
out and listed, with the reason, in report.txt.

The dataset is written to DIR/NAME/1.0.0. A run that was killed goes on where it stopped: give the
same command again. What is complete is left alone; a command that asks for something else under the
same name is refused, unless with --overwrite.
"""

import difflib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mevit_jax import command
from mevit_jax.data import builders, datasets, shards
from mevit_jax.data.builders import files, moving_shapes, report, video_folder
from mevit_jax.errors import UserError

DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where datasets lie, each in a folder of its own.')
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Prepare again what is already complete.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the videos drawn, or of the split.', lower_bound=0)
WORKERS = flags.DEFINE_integer('workers', 0, 'Processes; 0: one for each core.', lower_bound=0)

TRAIN_VIDEOS = flags.DEFINE_integer('train_videos', 8192, 'moving_shapes: videos to train on.', lower_bound=8)
VALIDATION_VIDEOS = flags.DEFINE_integer(
  'validation_videos', 1024, 'moving_shapes: videos to validate on.', lower_bound=8
)
FRAMES = flags.DEFINE_integer('frames', 16, 'moving_shapes: frames of a video (30 a second).', lower_bound=2)
SIZE = flags.DEFINE_integer('size', 48, 'moving_shapes: height and width in pixels; even.', lower_bound=16)
NAME = flags.DEFINE_string('name', None, "video_folder: the dataset's name; the folder's or file's name if not given.")
VALIDATION_FRACTION = flags.DEFINE_float(
  'validation_fraction',
  0.2,
  'video_folder: how much of each class is for validation, where no split is given.',
  lower_bound=0.0,
  upper_bound=1.0,
)
MAX_DEAD = flags.DEFINE_float(
  'max_dead',
  0.1,
  'video_folder: stop, with a summary, if more than this share of the videos is dead.',
  lower_bound=0.0,
  upper_bound=1.0,
)
SHOWN = 20  # entries of a list on the terminal; report.txt has all


class Progress:
  """Prints how far it is and when it ends: over itself on a terminal, else a line now and then."""

  def __init__(self, what: str):
    self._what = what
    self._start = time.monotonic()
    self._first: int | None = None
    self._shown = float('-inf')

  def __call__(self, done: int, total: int) -> None:
    now = time.monotonic()
    if self._first is None:  # What an earlier run did says nothing of this one's speed.
      self._first = done
    terminal = sys.stdout.isatty()
    if done < total and now - self._shown < (0.2 if terminal else 10):
      return
    self._shown = now
    line = f'{self._what}: {done} of {total}'
    if done > self._first:
      each = (now - self._start) / (done - self._first)
      end = time.strftime('%H:%M:%S', time.localtime(time.time() + each * (total - done)))
      line += f', {1 / each:.1f}/s, ' + (f'ends at {end}' if done < total else f'ended at {end}')
    ending = '\n' if done == total or not terminal else ''
    print(f'\r\033[K{line}' if terminal else line, end=ending, flush=True)


def _moving_shapes(arguments: Sequence[str]) -> None:
  if arguments:
    raise UserError(f'moving_shapes takes no further argument, but got: {" ".join(arguments)}')
  if SIZE.value % 2:
    raise UserError(f'--size must be even, for the codec, but is {SIZE.value}')
  asked = {
    'kind': 'moving_shapes',
    'train_videos': TRAIN_VIDEOS.value,
    'validation_videos': VALIDATION_VIDEOS.value,
    'seed': SEED.value,
    'frames': FRAMES.value,
    'size': SIZE.value,
  }
  if _already('moving_shapes', asked, elsewhere='--data_dir'):
    return
  shards.begin(_directory('moving_shapes'))
  builder = moving_shapes.build(
    _data_dir(),
    {'train': TRAIN_VIDEOS.value, 'validation': VALIDATION_VIDEOS.value},
    SEED.value,
    FRAMES.value,
    SIZE.value,
  )
  shards.write(builder, _workers(), Progress('videos written'), asked)
  _summary('moving_shapes', 'configs/demo.py')


def _video_folder(arguments: Sequence[str]) -> None:
  if len(arguments) != 1:
    raise UserError('video_folder takes one folder or one CSV file: see --help')
  source = Path(arguments[0]).expanduser()
  name = _name(source)
  asked = {
    'kind': 'video_folder',
    'source': str(source.resolve()),
    'seed': SEED.value,
    'validation_fraction': VALIDATION_FRACTION.value,
  }
  if _already(name, asked, elsewhere='--name'):
    return
  listing = video_folder.find(source)
  found, names, notes = listing.found, listing.class_names, listing.notes
  if len(names) < 2:
    raise UserError(f'{source} has one class only ({names[0]}): there is nothing to tell apart')
  print(f'{len(found)} videos of {len(names)} classes in {source}')
  memory = _data_dir() / name / '.examined.jsonl'
  examined = files.examine_all(
    list(dict.fromkeys(each.path for each in found)),
    memory,
    _workers(),
    Progress('videos examined'),
  )
  items = [files.Item(each, examined[each.path]) for each in found]
  _check_dead(items, notes)
  _check_classes(items, notes)
  usable = [item for item in items if not item.examined.dead]
  splits = video_folder.split(usable, VALIDATION_FRACTION.value, SEED.value)
  summary = report.make(items, splits, notes)
  _check_room(_directory(name), sum(item.examined.bytes for item in usable))
  shards.begin(_directory(name))
  report.save(summary, _directory(name))
  builder = video_folder.VideoFolder(_data_dir(), name, names, splits)
  if any(each.split for each in found):  # Nothing was left to chance.
    asked = {key: asked[key] for key in ('kind', 'source')}
  shards.write(builder, _workers(), Progress('videos written'), asked)
  memory.unlink()
  print('\n' + report.text(summary, at_most=SHOWN))
  _summary(name, 'configs/video_folder.py')
  print(f'all that was found: {_directory(name) / "report.txt"}')


# Every dataset that this command prepares, and how; each takes the arguments after its name.
DATASETS: dict[str, Callable[[Sequence[str]], None]] = {
  'moving_shapes': _moving_shapes,
  'video_folder': _video_folder,
}


def _name(source: Path) -> str:
  """The dataset's name: --name, or one made of the folder's or the file's."""
  if NAME.value is None:
    path = source.resolve()
    name = re.sub(r'[^a-z0-9]+', '_', (path.stem if path.is_file() else path.name).lower())
    name = name.strip('_') or 'videos'
    return name if name[0].isalpha() else f'videos_{name}'
  if not re.fullmatch(r'[A-Za-z][A-Za-z0-9_]*', NAME.value):
    raise UserError(f'--name takes letters, digits and _, a letter first; not {NAME.value!r}')
  return NAME.value


def _check_dead(items: Sequence[files.Item], notes: Sequence[str]) -> None:
  dead = sum(bool(item.examined.dead) for item in items)
  if dead <= MAX_DEAD.value * len(items) and dead < len(items):
    return
  print('\n' + report.text(report.make(items, {}, notes), at_most=SHOWN))
  raise UserError(
    f'{dead} of {len(items)} videos are dead, more than --max_dead={MAX_DEAD.value:g} allows; nothing was written'
  )


def _check_classes(items: Sequence[files.Item], notes: Sequence[str]) -> None:
  """A class without any example would be one that the model can never be right about."""
  gone = video_folder.without_usable(items)
  if not gone:
    return
  print('\n' + report.text(report.make(items, {}, notes), at_most=SHOWN))
  raise UserError(
    f'all videos are dead of: {", ".join(gone)}; mend or add some, or leave the class out; nothing was written'
  )


def _check_room(directory: Path, needed: int) -> None:
  there = directory
  while not there.exists():
    there = there.parent
  old = sum(path.stat().st_size for path in directory.glob('*.array_record-*'))
  room = shutil.disk_usage(there).free + old
  if needed * 1.01 > room:  # keys, lengths and the index
    raise UserError(
      f'{_data_dir()} has {room / 1e9:.1f} GB free, and {needed * 1.01 / 1e9:.1f} GB are needed; nothing was written'
    )


def _data_dir() -> Path:
  return Path(DATA_DIR.value or '').expanduser()  # never None: the flag is required


def _directory(name: str) -> Path:
  return _data_dir() / name / builders.VERSION


def _workers() -> int:
  return WORKERS.value or os.cpu_count() or 1


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
  if OVERWRITE.value or not datasets.is_complete(directory):
    return False
  try:
    before = datasets.read_asked(directory)
  except (OSError, ValueError) as error:
    raise UserError(f'{directory} is damaged ({error}): give --overwrite') from error
  # What was not written down did not matter, or nobody knows.
  other = {key: value for key, value in before.items() if value != asked.get(key)}
  if 'kind' in other:
    other = {'kind': other['kind']}  # Another kind's flags say nothing more.
  if other:
    difference = ', '.join(f'{key} {value}, not {asked.get(key)}' for key, value in other.items())
    raise UserError(f'{directory} is of {difference}: give {elsewhere} or --overwrite')
  print(f'{directory} is already complete: nothing to do (--overwrite prepares it again).')
  return True


def _summary(name: str, config: str) -> None:
  directory = _directory(name)
  size = sum(path.stat().st_size for path in directory.glob('*.array_record-*'))
  mark, videos = datasets.read_fingerprint(directory)
  counts = ', '.join(f'{count} {split}' for split, count in videos.items())
  print(f'{name}: {counts} videos, {size / 1e6:.1f} MB, in {directory}')
  print(f'fingerprint: {mark}')
  print(
    f'next: python main.py --config={config} --workdir=WORKDIR --config.data.dataset={name}'
    f' --config.data.data_dir={_data_dir()}'
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
  DATASETS[name](arguments)


if __name__ == '__main__':
  command.run(main, required=['data_dir'])
