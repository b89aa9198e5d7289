"""The official split files of UCF101 and HMDB51, for `video_folder`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mevit_jax.datasets.builders import lists
from mevit_jax.datasets.builders.files import Found, Listing
from mevit_jax.errors import UserError

WANTED = (
  'the split files of UCF101 (classInd.txt, trainlist01.txt, testlist01.txt) or HMDB51 (CLASS_test_split1.txt), in a'
  ' folder'
)
_HMDB = re.compile(r'(.+)_test_split(\d+)\.txt')
_HMDB_SPLITS = {'0': '', '1': 'train', '2': 'validation'}


def find(videos: Path, folder: Path, fold: int) -> Listing:
  """The videos of one of the official splits; the test list is the validation split.

  A video's id is CLASS/NAME; its file is looked up by its name without suffix, in any folder, its class's first.

  Args:
    videos: a folder of them.
    folder: with UCF101's or HMDB51's split files.
    fold: which of the official splits: 1, 2 or 3.

  Raises:
    UserError: a file or folder that cannot be read or understood, a class that is not in classInd.txt, a video listed
      twice, lists none of whose videos are there.
  """
  files = {path.name: path for path in lists.gather([folder], ['.txt'], WANTED)}
  if 'classInd.txt' in files:
    names = _class_ind(files['classInd.txt'])
    rows = _ucf(files, names, folder, fold)
  else:
    matches = [match for name in files if (match := _HMDB.fullmatch(name))]
    if not matches:
      raise UserError(f'{folder} has no split files: wanted: {WANTED}; found: {lists.few(files)}')
    names = tuple(sorted({match[1] for match in matches}))
    rows = _hmdb({match[1]: files[match[0]] for match in matches if int(match[2]) == fold}, names, folder, fold)
  index = lists.Index(videos)
  places: dict[str, str] = {}
  found = []
  for label, name, split, where in rows:
    each = f'{label}/{name}'
    if places.setdefault(each, where) is not where:
      raise UserError(f'{where}: {each} is listed a second time, first in {places[each]}')
    path = index.take([name], label=label)
    if split:
      found.append(Found(each, path, label, split))
  if not found:
    raise UserError(f'{folder}: the split files list no videos')
  index.check(found)
  note = f'the test list of official split {fold} is the validation split'
  return Listing(sorted(found, key=lambda each: each.id), names, [note, *index.notes()])


def _lines(path: Path) -> Iterator[tuple[str, str]]:
  """Place and text of a file's lines, but for the empty ones."""
  for number, line in enumerate(lists.read(path).splitlines(), start=1):
    if line.strip():
      yield f'{path}, line {number}', line.strip()


def _class_ind(path: Path) -> tuple[str, ...]:
  """UCF101's classes in the order of their numbers, which start at 1."""
  names: list[str] = []
  for where, line in _lines(path):
    number, _, name = line.partition(' ')
    if number != str(len(names) + 1) or not name.strip():
      raise UserError(f'{where}: wanted: {len(names) + 1} CLASS; found: {line}')
    names.append(name.strip())
  return tuple(names)


def _ucf(
  files: Mapping[str, Path], names: Sequence[str], folder: Path, fold: int
) -> Iterator[tuple[str, str, str, str]]:
  """Class, name, split and place of each line CLASS/NAME.avi [NUMBER] of a fold's two lists."""
  for kind, split in (('train', 'train'), ('test', 'validation')):
    path = files.get(f'{kind}list{fold:02d}.txt')
    if path is None:
      raise UserError(f'{folder} has no {kind}list{fold:02d}.txt: it has {lists.few(files)}')
    for where, line in _lines(path):
      label, slash, rest = line.partition('/')
      if not slash:
        raise UserError(f'{where}: wanted: CLASS/NAME.avi [NUMBER]; found: {line}')
      if label not in names:
        raise UserError(f'{where}: classInd.txt has no class {label!r}{lists.nearest(label, names)}')
      name, _, number = rest.partition(' ')
      if number and number.strip() != str(names.index(label) + 1):
        raise UserError(f'{where}: {label} is number {names.index(label) + 1} in classInd.txt, not {number.strip()}')
      yield label, lists.stem(name), split, where


def _hmdb(
  files: Mapping[str, Path], names: Sequence[str], folder: Path, fold: int
) -> Iterator[tuple[str, str, str, str]]:
  """Class, name, split and place of each line NAME.avi NUMBER of a fold's file for each class."""
  for label in names:
    if label not in files:
      raise UserError(f'{folder} has no {label}_test_split{fold}.txt')
    for where, line in _lines(files[label]):
      name, _, number = line.rpartition(' ')
      if number not in _HMDB_SPLITS or not name:
        raise UserError(f'{where}: wanted: NAME.avi and 0 (unused), 1 (train) or 2 (test); found: {line}')
      yield label, lists.stem(name.strip()), _HMDB_SPLITS[number], where
