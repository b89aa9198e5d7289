"""Something-Something-v2: finds the numbered files of the videos that its JSON files list."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets.builders import lists
from mevit_jax.datasets.builders.files import ListedVideo, Listing
from mevit_jax.errors import UserError

EXPECTED_FILES = (
  "Something-Something-v2's labels.json, train.json, validation.json and, optionally, test.json and test-answers.csv"
)


def find(videos: Path, annotations: Sequence[Path]) -> Listing:
  """Finds the videos of Something-Something's lists; label ids are those of labels.json.

  A video's id is its number; its file is NUMBER.webm (or another suffix) in any folder. The test split has no labels,
  unless test-answers.csv (rows NUMBER;TEMPLATE) is given.

  Args:
    videos: folder of the videos.
    annotations: labels.json and the JSON files of the splits, or folders of them; a prefix as in
      something-something-v2-train.json is ignored.

  Raises:
    UserError: a file or folder cannot be read or parsed, a template is not in labels.json, a number is listed twice, or
      all listed videos are missing.
  """
  files, notes = _files(annotations)
  names = _class_names(files.pop('labels'))
  spellings = {lists.fold(name): name for name in names}
  if len(spellings) < len(names):
    alike = [name for name in names if spellings[lists.fold(name)] != name]
    raise UserError(
      f'{", ".join(map(str, annotations))}: classes that differ only in case, spaces or brackets: '
      f'{", ".join(f"{name!r} and {spellings[lists.fold(name)]!r}" for name in alike[:3])}; rename them in labels.json'
    )
  answers = _answers(files.pop('answers'), spellings) if 'answers' in files else {}
  index = lists.Index(videos)
  locations: dict[str, str] = {}
  listed: list[ListedVideo] = []
  for split, path in files.items():
    for number, label, location in _read(path, split, spellings):
      if locations.setdefault(number, location) is not location:
        raise UserError(f'{location}: video {number} is listed twice, first in {locations[number]}')
      label = label or answers.get(number, '')
      listed.append(ListedVideo(number, index.match([number], split, label), label, split))
  if not listed:
    raise UserError(f'{", ".join(map(str, files.values()))}: no videos are listed')
  index.check(listed)
  return Listing(sorted(listed, key=_by_number), names, [*notes, *index.notes()])


def _by_number(video: ListedVideo) -> tuple[int, str]:
  return int(video.id) if video.id.isdecimal() else 0, video.id


def _files(annotations: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
  """Returns the files by kind (labels, answers, or the split), and a note on other files."""
  files: dict[str, Path] = {}
  others = []
  for path in lists.gather(annotations, ['.json', '.csv'], EXPECTED_FILES):
    kind = next((kind for kind in ('labels', 'answers') if kind in path.stem.lower()), lists.split_of(path.stem))
    if not kind or (path.suffix.lower() == '.csv') != (kind == 'answers'):
      others.append(path.name)
    elif kind in files:
      raise UserError(f'{files[kind]} and {path} are both {kind} lists; name the one to use')
    else:
      files[kind] = path
  if 'labels' not in files or not {'train', 'validation'} & set(files):
    names = lists.few(path.name for path in files.values())
    raise UserError(f'{", ".join(map(str, annotations))}: expected: {EXPECTED_FILES}; got: {names}')
  return files, [f'files that are not lists are ignored: {lists.few(others)}'] if others else []


def _json(path: Path) -> Any:
  try:
    return json.loads(lists.read(path))
  except json.JSONDecodeError as error:
    raise UserError(f'{path}, line {error.lineno}: not valid JSON: {error.msg}') from error


def _class_names(path: Path) -> tuple[str, ...]:
  """Returns the templates in the order of their ids."""
  content = _json(path)
  try:
    ids = {int(number): name for name, number in content.items()}
  except (AttributeError, TypeError, ValueError):
    raise UserError(
      f'{path} must be an object that maps templates to ids, such as {{"Opening something": "46"}}'
    ) from None
  if sorted(ids) != list(range(len(content))):
    raise UserError(f'{path}: the ids of {len(content)} classes must be 0 to {len(content) - 1}, each exactly once')
  return tuple(ids[i] for i in range(len(ids)))


def _read(path: Path, split: str, spellings: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
  """Yields the number, class name ('' in a test list) and location of every entry."""
  content = _json(path)
  if not isinstance(content, list):
    raise UserError(f'{path} must be a list of videos, such as [{{"id": "1", "template": "Opening [something]"}}]')
  for i, entry in enumerate(content):
    location = f'{path}, entry {i + 1}'
    if not isinstance(entry, dict) or not str(entry.get('id', '')).strip():
      raise UserError(f'{location}: the id is missing')
    template = entry.get('template', '')
    if not template and split != 'test':
      raise UserError(f'{location}: the template is missing; only the test list may lack templates')
    yield str(entry['id']).strip(), _class(template, spellings, location) if template else '', location


def _answers(path: Path, spellings: Mapping[str, str]) -> dict[str, str]:
  """Returns the class of every video of the test split, by number."""
  answers = {}
  for line, row in enumerate(lists.read(path).splitlines(), start=1):
    number, _, template = row.partition(';')
    if row.strip():
      answers[number.strip()] = _class(template, spellings, f'{path}, line {line}')
  return answers


def _class(template: str, spellings: Mapping[str, str], location: str) -> str:
  """Returns the class of a template; labels.json writes [something] without brackets."""
  name = spellings.get(lists.fold(template))
  if name is None:
    raise UserError(f'{location}: labels.json has no class {template!r}{lists.nearest(template, spellings.values())}')
  return name
