"""Kinetics-400, -600 and -700: the clips of the official CSV files, and where their files lie."""

import dataclasses
import importlib.resources
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mevit_jax.datasets.builders import lists
from mevit_jax.datasets.builders.files import Found, Listing
from mevit_jax.errors import UserError

CLASSES = (400, 600, 700)
WANTED = 'the CSV files of Kinetics (train.csv, val.csv or validate.csv, test.csv), or a folder of them'


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
  """A row of a CSV file.

  Attributes:
    split: train, validation or test.
    name: YOUTUBE-ID_START_END, with six digits each, as its file is mostly called.
    youtube_id: eleven characters.
    start, end: in seconds of the YouTube video.
    label: '' where it has none.
    where: the CSV file and the line.
  """

  split: str
  name: str
  youtube_id: str
  start: int
  end: int
  label: str
  where: str


def class_names(classes: int) -> tuple[str, ...]:
  """The names of Kinetics-400, -600 or -700 in the order of the usual label maps: sorted, capitals first."""
  text = importlib.resources.files(__package__).joinpath(f'kinetics{classes}.txt').read_text('utf-8')
  return tuple(text.splitlines())


def find(videos: Path, annotations: Sequence[Path], classes: int) -> Listing:
  """The clips of Kinetics' CSV files; label ids are those of `class_names`, whatever the files hold.

  A clip's id is SPLIT/YOUTUBE-ID_START_END. Its file is looked up by name alone, in any folder: with start and end in
  seconds, with six digits or as they are, with the start alone, or with neither where the lists have one clip of that
  YouTube video.

  Args:
    videos: a folder of them.
    annotations: CSV files, and folders with some.
    classes: 400, 600 or 700.

  Raises:
    UserError: a file or folder that cannot be read or understood, a class that Kinetics does not have, a clip with two
      labels, lists none of whose videos are there.
  """
  names = class_names(classes)
  spellings = {lists.fold(name): name for name in names}
  paths = lists.gather(annotations, ['.csv'], WANTED)
  rows = [clip for path in paths for clip in _read(path, spellings, classes)]
  if not rows:
    raise UserError(f'{", ".join(map(str, annotations))}: the CSV files list no videos')
  clips, notes = _distinct(rows)
  index = lists.Index(videos)
  found = _look_up(clips, index)
  index.check(found)
  labels = {clip.label for clip in clips if clip.label}
  if len(labels) < classes:
    notes.append(f'the lists hold {len(labels)} of the {classes} classes; label ids stay those of all {classes}')
  return Listing(sorted(found, key=lambda each: each.id), names, [*notes, *index.notes()])


def _read(path: Path, spellings: dict[str, str], classes: int) -> Iterator[Clip]:
  place = lists.split_of(path.stem) or lists.SPLITS.get(path.parent.name.lower(), '')
  labels: dict[str, str] = {}  # as they are written here
  for line, row in lists.read_csv(path, ('youtube_id', 'time_start', 'time_end'), ('label', 'split')):
    where = f'{path}, line {line}'
    split = lists.SPLITS.get(row['split'].lower(), '') if row.get('split') else place
    if not split:
      known = ', '.join(lists.SPLITS)
      raise UserError(f'{where}: which split? Neither a column split nor the name of the file says one of {known}')
    label = row.get('label', '')
    if not label and split != 'test':
      raise UserError(f'{where}: the label is empty; only a test list may lack labels')
    if label and label not in labels:
      labels[label] = _class(label, spellings, classes, where)
    try:
      start, end = int(float(row['time_start'])), int(float(row['time_end']))
    except ValueError:
      raise UserError(
        f'{where}: time_start and time_end must be seconds, not {row["time_start"]!r} and {row["time_end"]!r}'
      ) from None
    youtube_id = row['youtube_id']
    if not youtube_id:
      raise UserError(f'{where}: the youtube_id is empty')
    name = f'{youtube_id}_{start:06d}_{end:06d}'
    yield Clip(split, name, youtube_id, start, end, labels.get(label, ''), where)


def _class(label: str, spellings: dict[str, str], classes: int, where: str) -> str:
  name = spellings.get(lists.fold(label))
  if name is None:
    others = [n for n in CLASSES if lists.fold(label) in map(lists.fold, class_names(n))]
    hint = f'; is this kinetics{others[0]}?' if others else lists.nearest(label, spellings.values())
    raise UserError(f'{where}: Kinetics-{classes} has no class {label!r}{hint}')
  return name


def _distinct(rows: Sequence[Clip]) -> tuple[list[Clip], list[str]]:
  """Each clip of a split once, and what there is to say of those listed twice."""
  clips: dict[tuple[str, str], Clip] = {}
  splits: dict[str, Clip] = {}
  repeated, shared = [], []
  for clip in rows:
    before = clips.setdefault((clip.split, clip.name), clip)
    if before is not clip:
      if before.label and clip.label and before.label != clip.label:
        raise UserError(
          f'{clip.where}: {clip.name} is of class {clip.label!r}, but of {before.label!r} in {before.where}:'
          ' keep one of the rows'
        )
      repeated.append(f'{clip.name} ({clip.where})')
      if clip.label:
        clips[clip.split, clip.name] = clip
      continue
    first = splits.setdefault(clip.name, clip)
    if first is not clip:
      shared.append(f'{clip.name} ({first.where} and {clip.where})')
  notes = []
  if repeated:
    notes.append(f'{len(repeated)} rows repeat another of their split, left out: {lists.few(repeated, 3)}')
  if shared:
    notes.append(f'WARNING: {len(shared)} clips are listed in two splits: {lists.few(shared, 3)}')
  return list(clips.values()), notes


def _look_up(clips: Sequence[Clip], index: lists.Index) -> list[Found]:
  same_video = Counter(youtube_id for youtube_id, _ in {(clip.youtube_id, clip.name) for clip in clips})
  found = []
  for clip in clips:
    names = [clip.name]
    names += [f'{clip.youtube_id}_{rest}' for rest in (f'{clip.start}_{clip.end}', f'{clip.start:06d}', clip.start)]
    if same_video[clip.youtube_id] == 1:
      names.append(clip.youtube_id)
    path = index.take(names, clip.split, clip.label)
    found.append(Found(f'{clip.split}/{clip.name}', path, clip.label, clip.split))
  return found
