"""Something-Something-v2: what its JSON lists name, and where the numbered files lie."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets.builders import lists
from mevit_jax.datasets.builders.files import Found, Listing
from mevit_jax.errors import UserError

WANTED = (
  "Something-Something-v2's labels.json, train.json, validation.json and, if you like, test.json and test-answers.csv"
)


def find(videos: Path, annotations: Sequence[Path]) -> Listing:
  """The videos of Something-Something's lists; label ids are those of labels.json.

  A video's id is its number; its file is NUMBER.webm (or another suffix) in any folder. A test split has no labels,
  unless test-answers.csv (rows NUMBER;TEMPLATE) is there.

  Args:
    videos: a folder of them.
    annotations: labels.json and the splits' JSON files, or folders with them; a prefix as in
      something-something-v2-train.json does not matter.

  Raises:
    UserError: a file or folder that cannot be read or understood, a template that labels.json does not have, a number
      that is listed twice, lists none of whose videos are there.
  """
  files, notes = _files(annotations)
  names = _class_names(files.pop('labels'))
  spellings = {lists.fold(name): name for name in names}
  answers = _answers(files.pop('answers'), spellings) if 'answers' in files else {}
  index = lists.Index(videos)
  places: dict[str, str] = {}
  found: list[Found] = []
  for split, path in files.items():
    for number, label, where in _read(path, split, spellings):
      if places.setdefault(number, where) is not where:
        raise UserError(f'{where}: video {number} is listed a second time, first in {places[number]}')
      label = label or answers.get(number, '')
      found.append(Found(number, index.take([number], split, label), label, split))
  if not found:
    raise UserError(f'{", ".join(map(str, files.values()))}: no video is listed')
  index.check(found)
  return Listing(sorted(found, key=_by_number), names, [*notes, *index.notes()])


def _by_number(found: Found) -> tuple[int, str]:
  return int(found.id) if found.id.isdecimal() else 0, found.id


def _files(annotations: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
  """Which file is which: labels, answers, and one for each split."""
  files: dict[str, Path] = {}
  others = []
  for path in lists.gather(annotations, ['.json', '.csv'], WANTED):
    kind = next((kind for kind in ('labels', 'answers') if kind in path.stem.lower()), lists.split_of(path.stem))
    if not kind or (path.suffix.lower() == '.csv') != (kind == 'answers'):
      others.append(path.name)
    elif kind in files:
      raise UserError(f'{files[kind]} and {path} are both lists of {kind}: name the one to take')
    else:
      files[kind] = path
  if 'labels' not in files or not {'train', 'validation'} & set(files):
    there = lists.few(path.name for path in files.values())
    raise UserError(f'{", ".join(map(str, annotations))}: wanted: {WANTED}; found: {there}')
  return files, [f'files that are no lists, left out: {lists.few(others)}'] if others else []


def _json(path: Path) -> Any:
  try:
    return json.loads(lists.read(path))
  except json.JSONDecodeError as error:
    raise UserError(f'{path}, line {error.lineno}: this is not JSON: {error.msg}') from error


def _class_names(path: Path) -> tuple[str, ...]:
  """The templates in the order of their ids."""
  content = _json(path)
  try:
    ids = {int(number): name for name, number in content.items()}
  except (AttributeError, TypeError, ValueError):
    raise UserError(f'{path} must be an object of templates and ids, as {{"Opening something": "46"}}') from None
  if sorted(ids) != list(range(len(content))):
    raise UserError(f'{path}: the ids of {len(content)} classes must be 0 to {len(content) - 1}, each once')
  return tuple(ids[i] for i in range(len(ids)))


def _read(path: Path, split: str, spellings: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
  """Number, class name ('' in a test list) and place of every entry."""
  content = _json(path)
  if not isinstance(content, list):
    raise UserError(f'{path} must be a list of videos, as [{{"id": "1", "template": "Opening [something]"}}]')
  for i, entry in enumerate(content):
    where = f'{path}, entry {i + 1}'
    if not isinstance(entry, dict) or not str(entry.get('id', '')).strip():
      raise UserError(f'{where}: a video needs an id')
    template = entry.get('template', '')
    if not template and split != 'test':
      raise UserError(f'{where}: a video of {split} needs a template')
    yield str(entry['id']).strip(), _class(template, spellings, where) if template else '', where


def _answers(path: Path, spellings: Mapping[str, str]) -> dict[str, str]:
  """The class of every video of the test split, by its number."""
  answers = {}
  for line, row in enumerate(lists.read(path).splitlines(), start=1):
    number, _, template = row.partition(';')
    if row.strip():
      answers[number.strip()] = _class(template, spellings, f'{path}, line {line}')
  return answers


def _class(template: str, spellings: Mapping[str, str], where: str) -> str:
  """The class of a template, whose [something]s labels.json writes without brackets."""
  name = spellings.get(lists.fold(template))
  if name is None:
    raise UserError(f'{where}: labels.json has no class {template!r}{lists.nearest(template, spellings.values())}')
  return name
