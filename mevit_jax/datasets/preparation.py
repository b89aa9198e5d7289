"""From a listing of videos in files to a dataset: what is there, what is usable, splits, shards, a report."""

import dataclasses
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import files, lists, report, video_folder
from mevit_jax.datasets.builders.files import Found, Item, Listing
from mevit_jax.datasets.tasks import Check, Engine, Progress, Row
from mevit_jax.errors import UserError
from mevit_jax.video.transcode import Encoding

SHOWN = 20  # entries of a list on the terminal; report.txt has all
TRIED = 8  # videos encoded again to know how much smaller they become


@dataclasses.dataclass(frozen=True)
class Options:
  """How a dataset is prepared.

  Attributes:
    engine: what does the work, and where.
    progress: makes a progress line of a title.
    max_dead, max_missing: shares of the videos; with more it stops.
    encoding: how videos are stored.
    time_limit: seconds to decode a video in; what takes longer is dead. 0: as long as it takes.
    validation_fraction, seed: of the split, where the listing gives none.
    all_classes: whether a class without any usable video is an error; else it is a note.
  """

  engine: Engine
  progress: Callable[[str], Progress]
  max_dead: float = 0.1
  max_missing: float = 0.2
  encoding: Encoding = files.KEEP
  time_limit: float = 120
  validation_fraction: float = 0.2
  seed: int = 0
  all_classes: bool = True


def prepare(directory: Path, listing: Listing, asked: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """Writes the dataset DATA_DIR/NAME/VERSION of a listing's videos, and returns the report on it.

  Every video is decoded once. Where the listing gives no splits that comes first, because they are made of usable
  videos; else each shard's videos are read, decoded and written in one go.

  Raises:
    UserError: too many videos are missing or dead, a class or a split has no usable one, the disk
      is too small or full, a file changes meanwhile. What was done by then need not be done again.
  """
  items, missing, notes = _whole_splits(listing)
  classes = len(listing.class_names)
  print(f'{len(items) + len(missing)} videos of {classes} classes, {len(missing)} of them missing', flush=True)
  _check_missing(items, missing, options.max_missing)
  examined = directory.parent / '.examined'
  dead: list[Row] = []
  if any(item.found.split for item in items):
    splits = files.by_split(items)
  else:
    splits, dead = _examine_and_split(items, missing, listing, notes, examined, options)
  _check_room(directory, *_stored_bytes([item for each in splits.values() for item in each], examined, options))
  data_dir, name = directory.parents[1], directory.parent.name
  builder = files.FilesBuilder(data_dir, name, listing.class_names, splits, options.encoding, options.time_limit)
  summary: dict[str, Any] = {}

  def finish(rows: Callable[[], Iterator[tuple[str, Row]]]) -> None:
    summary.update(report.make(lambda: itertools.chain(rows(), (('', row) for row in dead)), missing, notes))
    _check_usable(summary, listing, options.all_classes)
    report.save(summary, directory)

  check = _dead_check(options.max_dead)
  shards.write(builder, options.engine, options.progress('videos written'), check, asked, finish)
  shutil.rmtree(examined, ignore_errors=True)
  return summary


def _examine_and_split(
  items: Sequence[Item],
  missing: Sequence[Found],
  listing: Listing,
  notes: Sequence[str],
  directory: Path,
  options: Options,
) -> tuple[dict[str, list[Item]], list[Row]]:
  """Splits made of the usable videos, and the rows of the dead."""
  check = _dead_check(options.max_dead)
  progress = options.progress('videos examined')
  rows = files.examine(items, directory, options.engine, progress, check, time_limit=options.time_limit)
  summary = report.make(lambda: (('', row) for row in rows.values()), missing, notes)
  _check_usable(summary, listing, options.all_classes)
  usable = [dataclasses.replace(item, examined=rows[item.found.id]) for item in items]
  usable = [item for item in usable if item.examined and 'dead' not in item.examined]
  splits = video_folder.split(usable, options.validation_fraction, options.seed)
  return splits, [row for row in rows.values() if 'dead' in row]


def _whole_splits(listing: Listing) -> tuple[list[Item], list[Found], list[str]]:
  """The videos that are there, those that are missing, and notes; without a test split none of whose videos is there.

  Raises:
    UserError: none of another split's is there.
  """
  items, missing = files.on_disk(listing)
  counts = Counter(found.split for found in missing)
  gone = [split for split in counts if split not in {item.found.split for item in items}]
  for split in gone:
    if split != 'test':
      raise UserError(f'none of the {counts[split]} videos of {split} is there; add them, or leave {split} out')
  notes = [f'{split} is left out: none of its {counts[split]} videos is there' for split in gone]
  return items, [found for found in missing if found.split not in gone], [*listing.notes, *notes]


def _check_missing(items: Sequence[Item], missing: Sequence[Found], limit: float) -> None:
  total = len(items) + len(missing)
  if len(missing) > limit * total:
    lines = report.section('missing', {each.id: each.path for each in missing}, SHOWN)
    print('\n'.join(lines), flush=True)
    raise UserError(
      f'{len(missing)} of {total} videos are not there, more than --max_missing={limit:g} allows; nothing was written'
    )


def _dead_check(limit: float) -> Check:
  """Stops as soon as more are dead than the limit allows of all of them."""

  def check(dead: Mapping[str, str], total: int) -> None:
    if len(dead) <= limit * total and len(dead) < total:
      return
    print('\n'.join(report.section('dead', dead, SHOWN)), flush=True)
    raise UserError(
      f'{len(dead)} of {total} videos are dead already, more than --max_dead={limit:g} allows; what is done is kept:'
      ' mend the videos or allow more, and give the command again to go on'
    )

  return check


def _check_usable(summary: dict[str, Any], listing: Listing, all_classes: bool) -> None:
  """A class without any video would be one that the model can never be right about; a split without any is none."""
  gone = report.without_usable(summary, listing.class_names)
  empty = [
    split
    for split, rows in summary['counts'].items()
    if split != report.UNSPLIT
    and any(row['dead'] for row in rows.values())  # not one that is left out
    and not any(row['usable'] for row in rows.values())
  ]
  if gone and not all_classes:
    summary['notes'].append(f'{len(gone)} classes have no usable video: {lists.few(gone, SHOWN)}')
    gone = []
  if gone or empty:
    print('\n' + report.text(summary, SHOWN), flush=True)
    raise UserError(
      f'all videos are dead or missing of: {lists.few([*empty, *gone], SHOWN)}; mend or add some, or leave it out,'
      ' and give the command again'
    )


def _stored_bytes(items: Sequence[Item], directory: Path, options: Options) -> tuple[float, str]:
  """How many bytes the videos will take, and 'about' where they are encoded again: then a few are, to see."""
  everything = sum(item.bytes for item in items)
  if options.encoding.kind == 'keep':
    return everything, ''
  sample = items[:: -(-len(items) // TRIED)]
  rows = files.examine(sample, directory, options.engine, encoding=options.encoding, time_limit=options.time_limit)
  usable = [(item.bytes, rows[item.found.id]['bytes']) for item in sample if 'dead' not in rows[item.found.id]]
  before, after = (sum(sizes) for sizes in zip(*usable, strict=True)) if usable else (1, 1)
  print(f'encoded again, {before / 1e6:.1f} MB of the videos are {after / 1e6:.1f} MB', flush=True)
  return everything * after / before, 'about '


def _check_room(directory: Path, needed: float, about: str) -> None:
  there = directory
  while not there.exists():
    there = there.parent
  old = sum(path.stat().st_size for path in directory.glob('*.array_record-*'))
  room = shutil.disk_usage(there).free + old
  if needed * 1.01 > room:  # keys, lengths and the index
    raise UserError(
      f'{there} has {_size(room)} free, and {about}{_size(needed * 1.01)} are needed; nothing was written'
    )


def _size(bytes_: float) -> str:
  return f'{bytes_ / 1e9:.1f} GB' if bytes_ >= 1e9 else f'{bytes_ / 1e6:.1f} MB'
