"""A user's own videos, in class folders or listed in a CSV file, and their split."""

import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from mevit_jax.datasets.builders import lists, split_files
from mevit_jax.datasets.builders.files import ListedVideo, Listing, VideoFile
from mevit_jax.errors import UserError, printable


def class_names(videos: Sequence[ListedVideo]) -> tuple[str, ...]:
  """Returns all labels, sorted; numerically if every label is a number."""
  labels = {video.label for video in videos}
  numbers = all(label.isdecimal() for label in labels)
  return tuple(sorted(labels, key=lambda label: (int(label) if numbers else 0, label)))


def find(source: str | Path, split_lists: str | Path | None = None, fold: int = 1) -> Listing:
  """Finds the videos of ROOT/[SPLIT/]CLASS/... or of a CSV file, sorted by id.

  Args:
    source: the folder or the CSV file.
    split_lists: folder of UCF101's or HMDB51's official split files, which then give each video's class and split.
    fold: number of the official split.

  Raises:
    UserError: there are no videos, or folders, columns or split files cannot be parsed.
  """
  path = Path(source).expanduser()
  if split_lists is not None:
    return split_files.find(path, Path(split_lists).expanduser(), fold)
  if path.is_dir():
    videos, notes = _find_in_folder(path)
  elif path.is_file():
    videos, notes = _find_in_csv(path)
  else:
    raise UserError(f'{path} does not exist; give a folder of videos or a CSV file')
  if {video.split for video in videos} == {'train'}:
    notes.append('only a train split was given: the validation split is taken from it')
    videos = [dataclasses.replace(video, split='') for video in videos]
  return Listing(sorted(videos, key=lambda video: video.id), class_names(videos), notes)


def _find_in_folder(root: Path) -> tuple[list[ListedVideo], list[str]]:
  files = list(lists.walk(root))
  others = [path for path in files if not lists.is_video(path)]
  videos = [path.split('/') for path in files if lists.is_video(path)]
  if not videos:
    raise UserError(f'{root} contains no videos ({lists.kinds(others) or "it is empty"})')
  tops = {parts[0] for parts in videos if len(parts) > 1}
  split_folders = {top for top in tops if top.lower() in lists.SPLITS}
  if split_folders and split_folders != tops:
    raise UserError(
      f'{root} contains split folders ({lists.few(split_folders)}) and others ({lists.few(tops - split_folders)});'
      ' use either ROOT/SPLIT/CLASS or ROOT/CLASS, or give a CSV file (path,label,split)'
    )
  depth = 2 if split_folders else 1
  in_classes = [parts for parts in videos if len(parts) > depth]
  if not in_classes:
    expected = 'ROOT/SPLIT/CLASS/VIDEO' if split_folders else 'ROOT/CLASS/VIDEO'
    raise UserError(f'{root}: its {len(videos)} videos are not in class folders; expected: {expected}')
  notes = [f'files that are not videos are left out: {lists.kinds(others)}'] if others else []
  if len(in_classes) < len(videos):
    notes.append(f'videos outside a class folder are left out: {len(videos) - len(in_classes)}')
  labels, spellings = _clean_labels(parts[depth - 1] for parts in in_classes)
  listed = [
    ListedVideo(
      id=_clean('/'.join(parts)),
      path=str(root.joinpath(*parts)),
      label=labels[parts[depth - 1]],
      split=lists.SPLITS[parts[0].lower()] if split_folders else '',
    )
    for parts in in_classes
  ]
  return listed, [*notes, *spellings]


def _find_in_csv(path: Path) -> tuple[list[ListedVideo], list[str]]:
  listed: dict[str, ListedVideo] = {}
  first_lines: dict[str, int] = {}  # by path
  for line, row in lists.read_csv(path, ('path', 'label'), ('split',)):
    location = f'{path}, line {line}'
    name, label, split = row['path'], row['label'], row.get('split', '').lower()
    if not name or not label:
      raise UserError(f'{location}: the path or the label is empty')
    if split and split not in lists.SPLITS:
      raise UserError(f'{location}: unknown split {split!r}; known: {", ".join(lists.SPLITS)}')
    name = os.path.normpath(name)  # ./a.mp4 and b/../a.mp4 are a.mp4
    video = ListedVideo(_clean(name), str(path.parent / name), label, lists.SPLITS.get(split, ''))
    first = first_lines.setdefault(os.path.abspath(video.path), line)
    if first != line or video.id in listed:
      raise UserError(f'{location}: {video.id} is listed twice' + (f', first in line {first}' if first != line else ''))
    listed[video.id] = video
  if not listed:
    raise UserError(f'{path} lists no videos')
  if len({bool(video.split) for video in listed.values()}) > 1:
    raise UserError(f'{path}: some rows have a split and others do not; give every row a split, or none')
  labels, notes = _clean_labels(video.label for video in listed.values())
  return [dataclasses.replace(video, label=labels[video.label]) for video in listed.values()], notes


def split(files: Sequence[VideoFile], fraction: float, seed: int) -> dict[str, list[VideoFile]]:
  """Splits every class at random into train and validation, each sorted by id.

  The random order is a hash of the seed and the video's bytes: it does not depend on order, names or machine, and
  copies of a video stay in one split location possible.

  Args:
    files: usable videos, examined.
    fraction: validation share of each class; each split gets at least one video.
    seed: seed of the split.

  Raises:
    UserError: a class has fewer than two videos to split.
  """
  classes: dict[str, list[VideoFile]] = {}
  for file in files:
    classes.setdefault(file.video.label, []).append(file)
  small = sorted(label for label, members in classes.items() if len(members) < 2)
  if small:
    raise UserError(
      f'too few usable videos to split (at least two are needed) in: {lists.few(small)}; add videos, remove the class,'
      ' or give the splits yourself'
    )
  splits: dict[str, list[VideoFile]] = {'train': [], 'validation': []}
  for members in classes.values():
    validation, train = _split_class(members, fraction, seed)
    splits['train'] += train
    splits['validation'] += validation
  return {name: sorted(members, key=lambda file: file.video.id) for name, members in splits.items()}


def _split_class(
  files: Sequence[VideoFile], fraction: float, seed: int
) -> tuple[Sequence[VideoFile], Sequence[VideoFile]]:
  def random_key(file: VideoFile) -> tuple[str, str]:
    assert file.examined is not None
    digest = hashlib.sha256(f'{seed} {file.examined["sha256"]}'.encode()).hexdigest()
    return digest, file.video.id

  files = sorted(files, key=random_key)
  keys = [random_key(file)[0] for file in files]
  target = min(max(round(fraction * len(files)), 1), len(files) - 1)
  boundaries = [i for i in range(1, len(files)) if keys[i] != keys[i - 1]] or [target]  # not between copies
  cut = min(boundaries, key=lambda i: abs(i - target))
  return files[:cut], files[cut:]


def _clean(name: str) -> str:
  """Spells a name the same on every machine: in NFC (macOS decomposes accents), other bytes than UTF-8 as escapes."""
  return printable(unicodedata.normalize('NFC', name))


def _clean_labels(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
  """Returns the label of each name of a class, and a note on names that are one class.

  Raises:
    UserError: names of different bytes have the same spelling.
  """
  labels = {name: _clean(' '.join(name.split())) for name in set(names)}
  groups: dict[str, list[str]] = {}
  for name, label in sorted(labels.items()):
    groups.setdefault(label, []).append(name)
  notes = []
  for label, group in groups.items():
    if len({unicodedata.normalize('NFC', ' '.join(name.split())) for name in group}) > 1:
      spelled = ' and '.join(repr(os.fsencode(name)) for name in group)
      raise UserError(f'the class names {spelled} are both spelled {label}; rename one of them')
    if len(group) > 1:
      notes.append(f'spellings that are taken as one class: {", ".join(map(ascii, group))}')
  return labels, notes
