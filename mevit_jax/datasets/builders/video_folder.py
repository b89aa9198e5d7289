"""A user's own videos: found in class folders or listed in a CSV, and split."""

import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from mevit_jax.datasets.builders import lists, split_files
from mevit_jax.datasets.builders.files import Found, Item, Listing
from mevit_jax.errors import UserError


def class_names(found: Sequence[Found]) -> tuple[str, ...]:
  """All labels, sorted; as numbers where every label is one."""
  labels = {each.label for each in found}
  numbers = all(label.isdecimal() for label in labels)
  return tuple(sorted(labels, key=lambda label: (int(label) if numbers else 0, label)))


def find(source: str | Path, split_lists: str | Path | None = None, fold: int = 1) -> Listing:
  """The videos of ROOT/[SPLIT/]CLASS/... or of a CSV, sorted by id.

  Args:
    source: the folder or the CSV.
    split_lists: a folder with UCF101's or HMDB51's official split files, which then say each video's class and split.
    fold: which of the official splits.

  Raises:
    UserError: there is no video; folders, columns or split files that cannot be understood.
  """
  path = Path(source).expanduser()
  if split_lists is not None:
    return split_files.find(path, Path(split_lists).expanduser(), fold)
  if path.is_dir():
    found, notes = _find_in_folder(path)
  elif path.is_file():
    found, notes = _find_in_csv(path), []
  else:
    raise UserError(f'{path} is neither a folder of videos nor a CSV file: it is not there')
  if {each.split for each in found} == {'train'}:
    notes.append('only a train split was given: validation is taken out of it')
    found = [dataclasses.replace(each, split='') for each in found]
  return Listing(sorted(found, key=lambda each: each.id), class_names(found), notes)


def _find_in_folder(root: Path) -> tuple[list[Found], list[str]]:
  files = list(lists.walk(root))
  others = [path for path in files if not lists.is_video(path)]
  videos = [path.split('/') for path in files if lists.is_video(path)]
  if not videos:
    raise UserError(f'{root} holds no videos ({lists.kinds(others) or "it is empty"})')
  tops = {parts[0] for parts in videos if len(parts) > 1}
  named = {top for top in tops if top.lower() in lists.SPLITS}
  if named and named != tops:
    raise UserError(
      f'{root} holds folders of splits ({lists.few(named)}) beside others ({lists.few(tops - named)}):'
      ' is it ROOT/SPLIT/CLASS or ROOT/CLASS? A CSV (path,label,split) can say it'
    )
  depth = 2 if named else 1
  classed = [parts for parts in videos if len(parts) > depth]
  if not classed:
    wanted = 'ROOT/SPLIT/CLASS/VIDEO' if named else 'ROOT/CLASS/VIDEO'
    raise UserError(f'{root}: its {len(videos)} videos lie in no class folder; wanted: {wanted}')
  notes = [f'files that are not videos, left out: {lists.kinds(others)}'] if others else []
  if len(classed) < len(videos):
    notes.append(f'videos outside a class folder, left out: {len(videos) - len(classed)}')
  found = [
    Found(
      id=_clean('/'.join(parts)),
      path=str(root.joinpath(*parts)),
      label=_clean_label(parts[depth - 1]),
      split=lists.SPLITS[parts[0].lower()] if named else '',
    )
    for parts in classed
  ]
  return found, notes


def _find_in_csv(path: Path) -> list[Found]:
  found: dict[str, Found] = {}
  for line, row in lists.read_csv(path, ('path', 'label'), ('split',)):
    where = f'{path}, line {line}'
    name, label, split = row['path'], row['label'], row.get('split', '').lower()
    if not name or not label:
      raise UserError(f'{where}: the path or the label is empty')
    if split and split not in lists.SPLITS:
      raise UserError(f'{where}: unknown split {split!r}; known: {", ".join(lists.SPLITS)}')
    each = Found(_clean(name), str(path.parent / name), _clean_label(label), lists.SPLITS.get(split, ''))
    if each.id in found:
      raise UserError(f'{where}: {each.id} is listed a second time')
    found[each.id] = each
  if not found:
    raise UserError(f'{path} lists no videos')
  if len({bool(each.split) for each in found.values()}) > 1:
    raise UserError(f'{path}: give every row a split, or none')
  return list(found.values())


def split(items: Sequence[Item], fraction: float, seed: int) -> dict[str, list[Item]]:
  """Splits every class in two by chance; each split sorted by id.

  Chance is a hash of the seed and the video's bytes: it depends on no order, name or machine, and
  copies of a video stay together wherever a class allows it.

  Args:
    items: usable videos, examined.
    fraction: how much of each class goes to validation; at least one video on either side.
    seed: another one, another split.

  Raises:
    UserError: a class has fewer than two videos to split.
  """
  classes: dict[str, list[Item]] = {}
  for item in items:
    classes.setdefault(item.found.label, []).append(item)
  small = sorted(label for label, members in classes.items() if len(members) < 2)
  if small:
    raise UserError(
      f'too few usable videos to split, one to train on and one to validate on, in: {lists.few(small)};'
      ' add videos, leave the class out, or give the splits yourself'
    )
  rows: dict[str, list[Item]] = {'train': [], 'validation': []}
  for members in classes.values():
    validation, train = _split_class(members, fraction, seed)
    rows['train'] += train
    rows['validation'] += validation
  return {name: sorted(each, key=lambda item: item.found.id) for name, each in rows.items()}


def _split_class(items: Sequence[Item], fraction: float, seed: int) -> tuple[Sequence[Item], Sequence[Item]]:
  def chance(item: Item) -> tuple[str, str]:
    assert item.examined is not None
    mixed = hashlib.sha256(f'{seed} {item.examined["sha256"]}'.encode()).hexdigest()
    return mixed, item.found.id

  items = sorted(items, key=chance)
  keys = [chance(item)[0] for item in items]
  wanted = min(max(round(fraction * len(items)), 1), len(items) - 1)
  between = [i for i in range(1, len(items)) if keys[i] != keys[i - 1]] or [wanted]
  cut = min(between, key=lambda i: abs(i - wanted))
  return items[:cut], items[cut:]


def _clean(name: str) -> str:
  """One spelling of a name on every machine (macOS decomposes accents), and valid UTF-8."""
  return unicodedata.normalize('NFC', os.fsencode(name).decode(errors='replace'))


def _clean_label(name: str) -> str:
  return ' '.join(_clean(name).split())
