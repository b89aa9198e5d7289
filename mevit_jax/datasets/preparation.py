"""Prepares a dataset from a listing of video files: finds files, decodes them, splits, writes shards and a report."""

import dataclasses
import itertools
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets import shards
from mevit_jax.datasets.builders import files, lists, report, video_folder
from mevit_jax.datasets.builders.files import Limits, ListedVideo, Listing, VideoFile
from mevit_jax.datasets.tasks import Check, Executor, ProgressCallback, Row
from mevit_jax.errors import UserError
from mevit_jax.progress import Progress
from mevit_jax.video.container import MAX_PIXELS
from mevit_jax.video.transcode import Encoding

MAX_SHOWN = 20  # entries of a list that are shown on the terminal; report.txt has all
SAMPLE_VIDEOS = 8  # videos that are re-encoded to estimate the size of the dataset

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of preparation.

  Attributes:
    executor: runs the tasks: `tasks.run_local` or `beam.run`.
    progress: function of a description that returns a progress callback.
    max_unusable, max_missing: largest shares of unusable and of missing videos; more stop the preparation.
    encoding: encoding that videos are stored in.
    time_limit, max_bytes, max_pixels: what a video may take at most, see `files.Limits`.
    validation_fraction, seed: settings of the split, if the listing gives none.
    keep: True to only write shards that a dataset has lost; see `shards.write`.
    all_classes: True if a class without usable videos is an error, False if it is only noted.
  """

  executor: Executor
  progress: Callable[[str], ProgressCallback] = Progress
  max_unusable: float = 0.1
  max_missing: float = 0.2
  encoding: Encoding = files.KEEP
  time_limit: float = 120
  max_bytes: int = files.MAX_BYTES
  max_pixels: int = MAX_PIXELS
  validation_fraction: float = 0.2
  seed: int = 0
  keep: bool = False
  all_classes: bool = True

  @property
  def limits(self) -> Limits:
    """Limits of a single video."""
    return Limits(self.time_limit, self.max_bytes, self.max_pixels)


def prepare(directory: Path, listing: Listing, arguments: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """Writes the dataset DATA_DIR/NAME/VERSION of a listing's videos and returns the report.

  Every video is decoded once. If the listing gives no splits, all videos are decoded first, because the splits are made
  of usable videos; otherwise the videos of a shard are read, decoded and written together.

  Args:
    directory: directory of the dataset.
    listing: listed videos.
    arguments: arguments that decide the dataset's content, saved with it.
    options: options of preparation.

  Raises:
    UserError: too many videos are missing or unusable, a class or split has no usable video, the disk is too small or
      full, or a file changes meanwhile. Work done by then is kept.
  """
  present, missing, notes = _find_splits(listing)
  _LOG.info(
    '%d videos of %d classes, %d of them missing', len(present) + len(missing), len(listing.class_names), len(missing)
  )
  _check_missing(present, missing, options.max_missing)
  examined = directory.parent / '.examined'
  unusable: list[Row] = []
  if any(file.video.split for file in present):
    splits = files.group_by_split(present)
  else:
    splits, unusable = _examine_and_split(present, missing, listing, notes, examined, options)
  usable = [file for members in splits.values() for file in members]
  _check_disk_space(directory, *_estimate_bytes(usable, examined, options))
  data_dir, name = directory.parents[1], directory.parent.name
  builder = files.FilesBuilder(data_dir, name, listing.class_names, splits, options.encoding, options.limits)
  summary: dict[str, Any] = {}

  def finish(rows: Callable[[], Iterator[tuple[str, Row]]]) -> None:
    summary.update(report.make(lambda: itertools.chain(rows(), (('', row) for row in unusable)), missing, notes))
    _check_usable(summary, listing, options.all_classes)
    report.save(summary, directory)

  check = _make_unusable_check(options.max_unusable)
  shards.write(builder, options.executor, options.progress('videos written'), check, arguments, finish, options.keep)
  shutil.rmtree(examined, ignore_errors=True)
  return summary


def _examine_and_split(
  present: Sequence[VideoFile],
  missing: Sequence[ListedVideo],
  listing: Listing,
  notes: Sequence[str],
  directory: Path,
  options: Options,
) -> tuple[dict[str, list[VideoFile]], list[Row]]:
  """Returns splits made of the usable videos, and the rows of the unusable ones."""
  check = _make_unusable_check(options.max_unusable)
  progress = options.progress('videos examined')
  rows = files.examine(present, directory, options.executor, progress, check, limits=options.limits)
  summary = report.make(lambda: (('', row) for row in rows.values()), missing, notes)
  _check_usable(summary, listing, options.all_classes)
  examined = [dataclasses.replace(file, examined=rows[file.video.id]) for file in present]
  usable = [file for file in examined if file.examined and 'unusable' not in file.examined]
  splits = video_folder.split(usable, options.validation_fraction, options.seed)
  return splits, [row for row in rows.values() if 'unusable' in row]


def _find_splits(listing: Listing) -> tuple[list[VideoFile], list[ListedVideo], list[str]]:
  """Returns the videos that exist, those that are missing, and notes; drops a test split without any file.

  Raises:
    UserError: all videos of another split are missing.
  """
  present, missing = files.find_files(listing)
  counts = Counter(video.split for video in missing)
  absent = [split for split in counts if split not in {file.video.split for file in present}]
  for split in absent:
    if split != 'test':
      raise UserError(
        f'all {counts[split]} videos of the {split} split are missing; add them, or remove the {split} list'
      )
  notes = [f'the {split} split is left out: all of its {counts[split]} videos are missing' for split in absent]
  notes += lists.similar(listing.class_names)
  return present, [video for video in missing if video.split not in absent], [*listing.notes, *notes]


def _check_missing(present: Sequence[VideoFile], missing: Sequence[ListedVideo], limit: float) -> None:
  total = len(present) + len(missing)
  if len(missing) > limit * total:
    _LOG.warning('\n'.join(report.section('missing', {video.id: video.path for video in missing}, MAX_SHOWN)))
    raise UserError(
      f'{len(missing)} of {total} videos are missing, more than --max_missing={limit:g} allows; nothing was written'
    )


def _make_unusable_check(limit: float) -> Check:
  """Returns a check that raises a UserError as soon as more than this share of all videos is unusable."""

  def check(unusable: Mapping[str, str], total: int) -> None:
    if len(unusable) <= limit * total and len(unusable) < total:
      return
    _LOG.warning('\n'.join(report.section('unusable', unusable, MAX_SHOWN)))
    raise UserError(
      f'{len(unusable)} of {total} videos are unusable already, more than --max_unusable={limit:g} allows; repair the'
      ' videos or raise the limit, and run the command again to continue'
    )

  return check


def _check_usable(summary: dict[str, Any], listing: Listing, all_classes: bool) -> None:
  """Raises a UserError for a split without usable videos and, if `all_classes`, for such a class; else adds a note."""
  classes = report.without_usable(summary, listing.class_names)
  splits = [
    split
    for split, counts in summary['counts'].items()
    if split != report.UNSPLIT
    and any(row['unusable'] for row in counts.values())  # not one that is left out
    and not any(row['usable'] for row in counts.values())
  ]
  if classes and not all_classes:
    summary['notes'].append(f'{len(classes)} classes have no usable video: {lists.few(classes, MAX_SHOWN)}')
    classes = []
  if classes or splits:
    _LOG.warning('\n%s', report.text(summary, MAX_SHOWN))
    raise UserError(
      f'all videos are unusable or missing in: {lists.few([*splits, *classes], MAX_SHOWN)}; repair or add some, or'
      ' leave it out, and run the command again'
    )


def _estimate_bytes(usable: Sequence[VideoFile], directory: Path, options: Options) -> tuple[float, str]:
  """Returns the bytes that the videos will take and, if estimated by re-encoding a sample, the word 'about '."""
  total = sum(file.num_bytes for file in usable)
  if options.encoding.kind == 'keep':
    return total, ''
  sample = usable[:: -(-len(usable) // SAMPLE_VIDEOS)]
  rows = files.examine(sample, directory, options.executor, encoding=options.encoding, limits=options.limits)
  sizes = [(file.num_bytes, rows[file.video.id]['bytes']) for file in sample if 'unusable' not in rows[file.video.id]]
  before, after = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (1, 1)
  _LOG.info('a sample of %.1f MB of the videos is %.1f MB when re-encoded', before / 1e6, after / 1e6)
  return total * after / before, 'about '


def _check_disk_space(directory: Path, needed: float, about: str) -> None:
  folder = directory
  while not folder.exists():
    folder = folder.parent
  reusable = sum(path.stat().st_size for path in directory.glob('*.array_record-*'))
  free = shutil.disk_usage(folder).free + reusable
  if needed * 1.01 > free:  # 1 % for keys, lengths and the index
    raise UserError(
      f'{folder} has {_format_bytes(free)} free, but {about}{_format_bytes(needed * 1.01)} are needed; nothing was'
      ' written'
    )


def _format_bytes(count: float) -> str:
  return f'{count / 1e9:.1f} GB' if count >= 1e9 else f'{count / 1e6:.1f} MB'
