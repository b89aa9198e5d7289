"""Helpers for reading datasets' lists: an index of video files by name, CSV rows, spellings of labels."""

import csv
import difflib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mevit_jax.datasets.builders.files import ListedVideo
from mevit_jax.errors import UserError, printable

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
  """Index of the videos below a folder by name without suffix; records which of them were matched.

  Raises:
    UserError: the folder does not exist or contains no videos.
  """

  def __init__(self, root: Path):
    self.root = root
    self._paths: dict[str, list[str]] = {}
    self._matched: set[str] = set()
    self._ambiguous: list[str] = []
    others: list[str] = []
    for path in walk(root):
      name = path.rpartition('/')[2]
      if (short := stem(name)) != name:
        self._paths.setdefault(short, []).append(path)
      else:
        others.append(name)
    if not self._paths:
      raise UserError(f'{root} contains no videos ({kinds(others) or "it is empty"}); archives must be extracted first')

  def match(self, names: Sequence[str], split: str = '', label: str = '') -> str:
    """Returns the path of a video's file, '' if it is missing; of several files, the same one on every machine.

    Args:
      names: possible names without suffix, in order of preference.
      split: split whose folder is preferred.
      label: class whose folder is preferred.
    """
    paths = [path for name in dict.fromkeys(names) if name in self._paths for path in self._paths[name]]
    if not paths:
      return ''
    self._matched.update(paths)
    if len(paths) == 1:
      return f'{self.root}/{paths[0]}'

    def preference(path: str) -> tuple[bool, int, int, bool, str]:
      *folders, name = path.split('/')
      splits = {SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS}
      return (
        # CVDF provides a folder replacement_for_corrupted_k400 for files that are broken elsewhere.
        not any(folder.startswith('replacement') for folder in folders),
        names.index(stem(name)),
        0 if split in splits else 2 if splits else 1,
        fold(label) not in map(fold, folders),
        path,
      )

    best = min(paths, key=preference)
    self._ambiguous.append(f'{best}, not {few(path for path in paths if path != best)}')
    return f'{self.root}/{best}'

  def notes(self) -> list[str]:
    """Returns notes, once all listed videos were matched."""
    unlisted = [path for paths in self._paths.values() for path in paths if path not in self._matched]
    notes = (
      [f'{len(self._ambiguous)} videos have several files; used: {few(self._ambiguous, 3)}'] if self._ambiguous else []
    )
    return notes + ([f'{len(unlisted)} videos are not listed and are left out: {few(unlisted, 3)}'] if unlisted else [])

  def check(self, videos: Sequence[ListedVideo]) -> None:
    """Raises a UserError if all listed videos are missing: the folder or the lists belong to another dataset."""
    if not any(video.path for video in videos):
      example = min(path for paths in self._paths.values() for path in paths)
      raise UserError(
        f'{self.root} contains none of the {len(videos)} listed videos; is it the right folder? It contains files like'
        f' {example}, but the lists name videos like {videos[0].id}'
      )


def walk(root: Path) -> Iterator[str]:
  """Yields the relative paths of all files below `root`; follows links, but not in loops; skips hidden files.

  Only names are read, so hundreds of thousands of files take seconds.

  Raises:
    UserError: a folder cannot be read.
  """
  if not root.is_dir():
    raise UserError(f'{root} is not a folder: it {"is a file" if root.exists() else "does not exist"}')
  folders: list[tuple[str, tuple[str, ...]]] = [('', ())]
  while folders:
    folder, ancestors = folders.pop()
    real = os.path.realpath(root / folder)
    if real in ancestors:
      continue
    try:
      with os.scandir(real) as entries:
        for entry in entries:
          if entry.name.startswith('.'):
            continue
          if entry.is_dir():
            folders.append((f'{folder}{entry.name}/', (*ancestors, real)))
          else:
            yield folder + entry.name
    except OSError as error:
      raise UserError(f'{root / folder} cannot be read: {error.strerror}') from error


def is_video(name: str) -> bool:
  """Returns True if a file's name has a video suffix."""
  return os.path.splitext(name)[1].lower() in SUFFIXES


def stem(name: str) -> str:
  """Returns a name without its video suffixes: clip for clip.mp4 and for clip.mp4.mkv."""
  while is_video(name):
    name = os.path.splitext(name)[0]
  return name


def gather(sources: Iterable[Path], suffixes: Sequence[str], wanted: str) -> list[Path]:
  """Returns the files among `sources` and the files with the given suffixes in the folders among them, sorted.

  Args:
    sources: files and folders.
    suffixes: suffixes of the files to take from folders.
    wanted: description of the expected files, for error messages.

  Raises:
    UserError: a source or a file in it does not exist.
  """
  sources, files = list(sources), []
  for source in sources:
    if not source.exists():
      raise UserError(f'{source} does not exist; expected: {wanted}')
    inside = [source / path for path in walk(source)] if source.is_dir() else [source]
    files += [path for path in inside if path == source or path.suffix.lower() in suffixes]
  if not files:
    raise UserError(f'no {" or ".join(suffixes)} file in {", ".join(map(str, sources))}; expected: {wanted}')
  return sorted(set(files))


def read(path: Path) -> str:
  """Returns a text file's content; raises a UserError if it cannot be read."""
  try:
    return path.read_text('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else 'it is not UTF-8 text'
    raise UserError(f'{path} cannot be read: {reason}') from error


def read_csv(
  path: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, Mapping[str, str]]]:
  """Yields (line number, cells by column) of each row of a CSV file; strips cells, drops empty columns at the end.

  Args:
    path: the CSV file.
    needed: columns that the file must have.
    optional: columns that the file may have, for the error message.

  Raises:
    UserError: the file is not a CSV file, lacks a needed column, or a row has too few or too many cells.
  """
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      reader = csv.reader(file)
      columns = [cell.strip().lower() for cell in next(reader, ())]
      while columns and not columns[-1]:
        columns.pop()
      if not set(needed) <= set(columns):
        wanted = ','.join(needed) + ''.join(f'[,{column}]' for column in optional)
        raise UserError(f'{path} must have the columns {wanted}; it has: {few(columns)}')
      for cells in reader:
        if not cells:
          continue
        if len(cells) < len(columns) or any(map(str.strip, cells[len(columns) :])):
          raise UserError(
            f'{path}, line {reader.line_num}: {len(cells)} fields for {len(columns)} columns; quote labels with commas'
          )
        if any('\0' in cell for cell in cells):
          raise UserError(f'{path}, line {reader.line_num}: a field contains a NUL byte; the file is damaged')
        yield reader.line_num, dict(zip(columns, map(str.strip, cells), strict=False))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{path} is not a CSV file in UTF-8: {error}') from error


def split_of(name: str) -> str:
  """Returns the split in a file's name, '' if there is none: train for kinetics-400_train.csv."""
  words = re.findall('[a-z]+', name.lower())
  return next((SPLITS[word] for word in words if word in SPLITS), '')


def fold(label: str) -> str:
  """Normalizes the spelling of a label: ignores case, spaces, underscores and brackets."""
  return ' '.join(re.sub(r'[\[\]_\s]+', ' ', label).lower().split())


def similar(names: Iterable[str]) -> list[str]:
  """Returns a warning for class names that differ only in case, spaces or Unicode's compatibility forms."""
  groups: dict[str, list[str]] = {}
  for name in names:
    key = ' '.join(unicodedata.normalize('NFKC', name).casefold().split())
    groups.setdefault(key, []).append(name)
  ascii_names = {name: name.encode('ascii', 'backslashreplace').decode() for group in groups.values() for name in group}
  alike = [' = '.join(ascii_names[name] for name in sorted(group)) for group in groups.values() if len(group) > 1]
  if not alike:
    return []
  return [f'WARNING: class names that differ only in case or Unicode form are different classes: {few(alike)}']


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns ' (nearest: NAME)' for an error message, '' if no name is similar."""
  matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
  return f' (nearest: {matches[0]!r})' if matches else ''


def kinds(names: Iterable[str]) -> str:
  """Returns the counts of suffixes: '2 .txt, 1 no suffix'."""
  counts = Counter(printable(os.path.splitext(name)[1].lower()) or 'no suffix' for name in names)
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return ', '.join(f'{count} {suffix}' for suffix, count in ordered[:5])


def few(names: Iterable[str], limit: int = 5) -> str:
  """Returns the first names in sorted order, printable, and the number of the others."""
  names = sorted(map(printable, names))
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more or 'none'
