"""Reads the official split files of UCF101 and HMDB51, for `video_folder`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mevit_jax.datasets.builders import lists
from mevit_jax.datasets.builders.files import ListedVideo, Listing
from mevit_jax.errors import UserError

EXPECTED_FILES = (
  'the split files of UCF101 (classInd.txt, trainlist01.txt, testlist01.txt) or HMDB51 (CLASS_test_split1.txt), in a'
  ' folder'
)
_HMDB = re.compile(r'(.+)_test_split(\d+)\.txt')
_HMDB_SPLITS = {'0': '', '1': 'train', '2': 'validation'}


def find(videos: Path, folder: Path, fold: int) -> Listing:
  """Finds the videos of one of the official splits; the test list becomes the validation split.

  A video's id is CLASS/NAME; its file is found by its name without suffix in any folder, preferably its class's.

  Args:
    videos: folder of the videos.
    folder: folder of UCF101's or HMDB51's split files.
    fold: number of the official split: 1, 2 or 3.

  Raises:
    UserError: a file or folder cannot be read or parsed, a class is not in classInd.txt, a video is listed twice, or
      all listed videos are missing.
  """
  files = {path.name: path for path in lists.gather([folder], ['.txt'], EXPECTED_FILES)}
  if 'classInd.txt' in files:
    names = _class_ind(files['classInd.txt'])
    rows = _ucf(files, names, folder, fold)
  else:
    matches = [match for name in files if (match := _HMDB.fullmatch(name))]
    if not matches:
      raise UserError(f'{folder} has no split files; expected: {EXPECTED_FILES}; it has: {lists.few(files)}')
    names = tuple(sorted({match[1] for match in matches}))
    rows = _hmdb({match[1]: files[match[0]] for match in matches if int(match[2]) == fold}, names, folder, fold)
  index = lists.Index(videos)
  locations: dict[str, str] = {}
  listed = []
  for label, name, split, location in rows:
    video_id = f'{label}/{name}'
    if locations.setdefault(video_id, location) is not location:
      raise UserError(f'{location}: {video_id} is listed twice, first in {locations[video_id]}')
    path = index.match([name], label=label)
    if split:
      listed.append(ListedVideo(video_id, path, label, split))
  if not listed:
    raise UserError(f'{folder}: the split files list no videos')
  index.check(listed)
  note = f'the test list of official split {fold} is the validation split'
  return Listing(sorted(listed, key=lambda video: video.id), names, [note, *index.notes()])


def _lines(path: Path) -> Iterator[tuple[str, str]]:
  """Yields the location and text of each line that is not empty."""
  for number, line in enumerate(lists.read(path).splitlines(), start=1):
    if line.strip():
      yield f'{path}, line {number}', line.strip()


def _class_ind(path: Path) -> tuple[str, ...]:
  """Returns UCF101's classes in the order of their numbers, which start at 1."""
  names: list[str] = []
  for location, line in _lines(path):
    number, _, name = line.partition(' ')
    if number != str(len(names) + 1) or not name.strip():
      raise UserError(f'{location}: expected {len(names) + 1} CLASS, got: {line}')
    names.append(name.strip())
  return tuple(names)


def _ucf(
  files: Mapping[str, Path], names: Sequence[str], folder: Path, fold: int
) -> Iterator[tuple[str, str, str, str]]:
  """Yields the class, name, split and location of each line CLASS/NAME.avi [NUMBER] of a fold's two lists."""
  for kind, split in (('train', 'train'), ('test', 'validation')):
    path = files.get(f'{kind}list{fold:02d}.txt')
    if path is None:
      raise UserError(f'{folder} has no {kind}list{fold:02d}.txt; it has: {lists.few(files)}')
    for location, line in _lines(path):
      label, slash, remainder = line.partition('/')
      if not slash:
        raise UserError(f'{location}: expected CLASS/NAME.avi [NUMBER], got: {line}')
      if label not in names:
        raise UserError(f'{location}: classInd.txt has no class {label!r}{lists.nearest(label, names)}')
      name, _, number = remainder.partition(' ')
      if number and number.strip() != str(names.index(label) + 1):
        raise UserError(
          f'{location}: {label} has the number {names.index(label) + 1} in classInd.txt, not {number.strip()}'
        )
      yield label, lists.stem(name), split, location


def _hmdb(
  files: Mapping[str, Path], names: Sequence[str], folder: Path, fold: int
) -> Iterator[tuple[str, str, str, str]]:
  """Yields the class, name, split and location of each line NAME.avi NUMBER of a fold's file of each class."""
  for label in names:
    if label not in files:
      raise UserError(f'{folder} has no {label}_test_split{fold}.txt')
    for location, line in _lines(files[label]):
      name, _, number = line.rpartition(' ')
      if number not in _HMDB_SPLITS or not name:
        raise UserError(f'{location}: expected NAME.avi and 0 (unused), 1 (train) or 2 (test), got: {line}')
      yield label, lists.stem(name.strip()), _HMDB_SPLITS[number], location
