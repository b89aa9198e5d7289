"""What readers of datasets' lists share: videos below a folder by name, rows of CSV files, spellings of labels."""

import csv
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mevit_jax.datasets.builders.files import Found
from mevit_jax.errors import UserError

_SUFFIXES = """
.3gp .asf .avi .divx .f4v .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm
.wmv
"""
SUFFIXES = frozenset(_SUFFIXES.split())
SPLITS = {
  'train': 'train',
  'validation': 'validation',
  'validate': 'validation',
  'val': 'validation',
  'valid': 'validation',
  'test': 'test',
}


class Index:
  """The videos below a folder by their names without suffixes; remembers which of them were taken.

  Raises:
    UserError: there is no such folder, or no video in it.
  """

  def __init__(self, root: Path):
    self.root = root
    self._paths: dict[str, list[str]] = {}
    self._taken: set[str] = set()
    self._choices: list[str] = []
    others: list[str] = []
    for path in walk(root):
      name = path.rpartition('/')[2]
      if (short := stem(name)) != name:
        self._paths.setdefault(short, []).append(path)
      else:
        others.append(name)
    if not self._paths:
      raise UserError(f'{root} holds no videos ({kinds(others) or "it is empty"}); archives must be extracted first')

  def take(self, names: Sequence[str], split: str = '', label: str = '') -> str:
    """A video's path, '' if it is not there; of several files the same one on every machine.

    Args:
      names: what it may be called, without suffix, the best first.
      split: a file in a folder of this split is better than in another's.
      label: likewise.
    """
    paths = [path for name in dict.fromkeys(names) if name in self._paths for path in self._paths[name]]
    if not paths:
      return ''
    self._taken.update(paths)
    if len(paths) == 1:
      return f'{self.root}/{paths[0]}'

    def worse(path: str) -> tuple[bool, int, int, bool, str]:
      *folders, name = path.split('/')
      splits = {SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS}
      return (
        # CVDF hands out a folder replacement_for_corrupted_k400 for files that are broken elsewhere.
        not any(folder.startswith('replacement') for folder in folders),
        names.index(stem(name)),
        0 if split in splits else 2 if splits else 1,
        fold(label) not in map(fold, folders),
        path,
      )

    best = min(paths, key=worse)
    self._choices.append(f'{best}, not {few(path for path in paths if path != best)}')
    return f'{self.root}/{best}'

  def notes(self) -> list[str]:
    """What there is to say once all that the lists name was taken."""
    unlisted = [path for paths in self._paths.values() for path in paths if path not in self._taken]
    notes = [f'{len(self._choices)} videos have several files; taken: {few(self._choices, 3)}'] if self._choices else []
    return notes + ([f'{len(unlisted)} videos are on no list, left out: {few(unlisted, 3)}'] if unlisted else [])

  def check(self, found: Sequence[Found]) -> None:
    """Raises a UserError if none of the videos listed is there: the folder, or the lists, are another dataset's."""
    if not any(each.path for each in found):
      example = min(path for paths in self._paths.values() for path in paths)
      raise UserError(
        f'{self.root} holds none of the {len(found)} listed videos: is it the right folder? It holds files like'
        f' {example}, and the lists name videos like {found[0].id}'
      )


def walk(root: Path) -> Iterator[str]:
  """Paths below `root`, with /, of all files; through links, but round no loop of them; hidden ones are left out.

  No file is asked for more than its name: hundreds of thousands take seconds.

  Raises:
    UserError: a folder cannot be read.
  """
  if not root.is_dir():
    raise UserError(f'{root} is no folder: {"it is a file" if root.exists() else "it is not there"}')
  folders: list[tuple[str, tuple[str, ...]]] = [('', ())]
  while folders:
    folder, above = folders.pop()
    real = os.path.realpath(root / folder)
    if real in above:
      continue
    try:
      with os.scandir(real) as entries:
        for entry in entries:
          if entry.name.startswith('.'):
            continue
          if entry.is_dir():
            folders.append((f'{folder}{entry.name}/', (*above, real)))
          else:
            yield folder + entry.name
    except OSError as error:
      raise UserError(f'{root / folder} cannot be read: {error.strerror}') from error


def is_video(name: str) -> bool:
  """Whether a file's name ends as a video's."""
  return os.path.splitext(name)[1].lower() in SUFFIXES


def stem(name: str) -> str:
  """clip.mp4 and, as some downloaders write it, clip.mp4.mkv -> clip; dots before that belong to the name."""
  while is_video(name):
    name = os.path.splitext(name)[0]
  return name


def gather(sources: Iterable[Path], suffixes: Sequence[str], wanted: str) -> list[Path]:
  """The files among `sources`, and those with the suffixes in the folders among them, sorted.

  Raises:
    UserError: one is not there, or there is none; `wanted` says what was looked for.
  """
  sources, found = list(sources), []
  for source in sources:
    if not source.exists():
      raise UserError(f'{source} is not there; wanted: {wanted}')
    inside = [source / path for path in walk(source)] if source.is_dir() else [source]
    found += [path for path in inside if path == source or path.suffix.lower() in suffixes]
  if not found:
    raise UserError(f'no {" or ".join(suffixes)} file in {", ".join(map(str, sources))}; wanted: {wanted}')
  return sorted(set(found))


def read(path: Path) -> str:
  """A list's text; UserError if it cannot be read."""
  try:
    return path.read_text('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else 'it is not text in UTF-8'
    raise UserError(f'{path} cannot be read: {reason}') from error


def read_csv(
  path: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, Mapping[str, str]]]:
  """Line number and row, a dict, of each row of a CSV file; cells are stripped, empty columns at the end dropped.

  Raises:
    UserError: it is no CSV file, misses a column that is needed, or a row has too few or too many cells.
  """
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      reader = csv.reader(file)
      columns = [cell.strip().lower() for cell in next(reader, ())]
      while columns and not columns[-1]:
        columns.pop()
      if not set(needed) <= set(columns):
        wanted = ','.join(needed) + ''.join(f'[,{column}]' for column in optional)
        raise UserError(f'{path} needs the columns {wanted}; found: {few(columns)}')
      for cells in reader:
        if not cells:
          continue
        if len(cells) < len(columns) or any(map(str.strip, cells[len(columns) :])):
          raise UserError(
            f'{path}, line {reader.line_num}: as many fields as columns, please (quote a label with a comma)'
          )
        yield reader.line_num, dict(zip(columns, map(str.strip, cells), strict=False))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{path} is not a CSV file in UTF-8: {error}') from error


def split_of(name: str) -> str:
  """The split that a file's name speaks of, '' if of none: kinetics-400_train.csv -> train."""
  words = re.findall('[a-z]+', name.lower())
  return next((SPLITS[word] for word in words if word in SPLITS), '')


def fold(label: str) -> str:
  """One key for all spellings of a label: case, spaces, underscores and brackets do not matter."""
  return ' '.join(re.sub(r'[\[\]_\s]+', ' ', label).lower().split())


def nearest(name: str, names: Iterable[str]) -> str:
  """' (nearest: NAME)' if there is one, to end an error with."""
  near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
  return f' (nearest: {near[0]!r})' if near else ''


def kinds(names: Iterable[str]) -> str:
  """Counts of suffixes: 2 .txt, 1 no suffix."""
  counts = Counter(os.path.splitext(name)[1].lower() or 'no suffix' for name in names)
  often = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
  return ', '.join(f'{count} {suffix}' for suffix, count in often[:5])


def few(names: Iterable[str], at_most: int = 5) -> str:
  """The first of some names, sorted, and how many more."""
  names = sorted(names)
  more = f' and {len(names) - at_most} more' if len(names) > at_most else ''
  return ', '.join(names[:at_most]) + more or 'none'
