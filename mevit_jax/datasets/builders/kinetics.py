"""Kinetics-400, -600 and -700: finds the files of the clips that the official CSV files list."""

import dataclasses
import importlib.resources
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mevit_jax.datasets.builders import lists
from mevit_jax.datasets.builders.files import ListedVideo, Listing
from mevit_jax.errors import UserError

CLASSES = (400, 600, 700)
EXPECTED_FILES = 'the CSV files of Kinetics (train.csv, val.csv or validate.csv, test.csv), or a folder of them'


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
  """A row of a CSV file.

  Attributes:
    split: train, validation or test.
    name: YOUTUBE-ID_START_END with six digits each, the usual name of its file.
    youtube_id: id of the YouTube video, eleven characters.
    start, end: seconds of the YouTube video.
    label: class name; '' if it has none.
    location: CSV file and line.
  """

  split: str
  name: str
  youtube_id: str
  start: int
  end: int
  label: str
  location: str


def class_names(classes: int) -> tuple[str, ...]:
  """Returns the classes of Kinetics-400, -600 or -700 in the usual label order: sorted, capitals first."""
  text = importlib.resources.files(__package__).joinpath(f'kinetics{classes}.txt').read_text('utf-8')
  return tuple(text.splitlines())


def find(videos: Path, annotations: Sequence[Path], classes: int) -> Listing:
  """Finds the clips of Kinetics' CSV files; label ids are those of `class_names`, whatever the files contain.

  A clip's id is SPLIT/YOUTUBE-ID_START_END. Its file is found by name in any folder: with start and end in seconds,
  zero-padded to six digits or not, with the start alone, or with neither if the lists have only one clip of that
  YouTube video.

  Args:
    videos: folder of the videos.
    annotations: CSV files, or folders of CSV files.
    classes: 400, 600 or 700.

  Raises:
    UserError: a file or folder cannot be read or parsed, Kinetics does not have a class, a clip has two labels, or all
      listed videos are missing.
  """
  names = class_names(classes)
  spellings = {lists.fold(name): name for name in names}
  paths = lists.gather(annotations, ['.csv'], EXPECTED_FILES)
  rows = [clip for path in paths for clip in _read(path, spellings, classes)]
  if not rows:
    raise UserError(f'{", ".join(map(str, annotations))}: the CSV files list no videos')
  clips, notes = _distinct(rows)
  index = lists.Index(videos)
  listed = _find_clips(clips, index)
  index.check(listed)
  labels = {clip.label for clip in clips if clip.label}
  if len(labels) < classes:
    notes.append(f'the lists contain {len(labels)} of the {classes} classes; label ids are those of all {classes}')
  return Listing(sorted(listed, key=lambda video: video.id), names, [*notes, *index.notes()])


def _read(path: Path, spellings: dict[str, str], classes: int) -> Iterator[Clip]:
  default_split = lists.split_of(path.stem) or lists.SPLITS.get(path.parent.name.lower(), '')
  labels: dict[str, str] = {}  # class by spelling in this file
  for line, row in lists.read_csv(path, ('youtube_id', 'time_start', 'time_end'), ('label', 'split')):
    location = f'{path}, line {line}'
    split = lists.SPLITS.get(row['split'].lower(), '') if row.get('split') else default_split
    if not split:
      known = ', '.join(lists.SPLITS)
      raise UserError(
        f'{location}: unknown split; the column split or the name of the file must contain one of {known}'
      )
    label = row.get('label', '')
    if not label and split != 'test':
      raise UserError(f'{location}: the label is empty; only a test list may lack labels')
    if label and label not in labels:
      labels[label] = _class(label, spellings, classes, location)
    try:
      start, end = int(float(row['time_start'])), int(float(row['time_end']))
    except ValueError:
      raise UserError(
        f'{location}: time_start and time_end must be seconds, not {row["time_start"]!r} and {row["time_end"]!r}'
      ) from None
    youtube_id = row['youtube_id']
    if not youtube_id:
      raise UserError(f'{location}: the youtube_id is empty')
    name = f'{youtube_id}_{start:06d}_{end:06d}'
    yield Clip(split, name, youtube_id, start, end, labels.get(label, ''), location)


def _class(label: str, spellings: dict[str, str], classes: int, location: str) -> str:
  name = spellings.get(lists.fold(label))
  if name is None:
    versions = [count for count in CLASSES if lists.fold(label) in map(lists.fold, class_names(count))]
    hint = f'; is this kinetics{versions[0]}?' if versions else lists.nearest(label, spellings.values())
    raise UserError(f'{location}: Kinetics-{classes} has no class {label!r}{hint}')
  return name


def _distinct(rows: Sequence[Clip]) -> tuple[list[Clip], list[str]]:
  """Returns each clip of a split once, and notes on those listed twice."""
  clips: dict[tuple[str, str], Clip] = {}
  splits: dict[str, Clip] = {}
  repeated, shared = [], []
  for clip in rows:
    first = clips.setdefault((clip.split, clip.name), clip)
    if first is not clip:
      if first.label and clip.label and first.label != clip.label:
        raise UserError(
          f'{clip.location}: {clip.name} has the class {clip.label!r}, but {first.label!r} in {first.location};'
          ' keep one of the rows'
        )
      repeated.append(f'{clip.name} ({clip.location})')
      if clip.label:
        clips[clip.split, clip.name] = clip
      continue
    other = splits.setdefault(clip.name, clip)
    if other is not clip:
      shared.append(f'{clip.name} ({other.location} and {clip.location})')
  notes = []
  if repeated:
    notes.append(f'{len(repeated)} rows repeat another row of their split and are left out: {lists.few(repeated, 3)}')
  if shared:
    notes.append(f'WARNING: {len(shared)} clips are listed in two splits: {lists.few(shared, 3)}')
  return list(clips.values()), notes


def _find_clips(clips: Sequence[Clip], index: lists.Index) -> list[ListedVideo]:
  clip_counts = Counter(youtube_id for youtube_id, _ in {(clip.youtube_id, clip.name) for clip in clips})
  listed = []
  for clip in clips:
    names = [clip.name]
    names += [f'{clip.youtube_id}_{suffix}' for suffix in (f'{clip.start}_{clip.end}', f'{clip.start:06d}', clip.start)]
    if clip_counts[clip.youtube_id] == 1:
      names.append(clip.youtube_id)
    path = index.match(names, clip.split, clip.label)
    listed.append(ListedVideo(f'{clip.split}/{clip.name}', path, clip.label, clip.split))
  return listed
