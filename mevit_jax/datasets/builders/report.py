"""What preparation found: a report for people (text) and for programs (JSON)."""

import collections
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.datasets.builders.files import Found
from mevit_jax.datasets.tasks import Row

UNSPLIT = 'not split'
SHORT = 1.0  # seconds
_COUNTS = ('found', 'usable', 'damaged', 'short', 'dead', 'missing')
_FEW = 10  # classes, and reasons, of many on the terminal


def make(
  rows: Callable[[], Iterator[tuple[str, Row]]], missing: Sequence[Found] = (), notes: Sequence[str] = ()
) -> dict[str, Any]:
  """Counts, reasons and copies.

  Args:
    rows: called for the split and the row of every video whose file is there, dead ones too.
    missing: the others.
    notes: what else there is to say.
  """
  counts: dict[str, dict[str, dict[str, int]]] = {}
  lists: dict[str, dict[str, str]] = {'dead': {}, 'damaged': {}, 'short': {}}

  def count(split: str, label: str, *keys: str) -> None:
    row = counts.setdefault(split or UNSPLIT, {}).setdefault(label, dict.fromkeys(_COUNTS, 0))
    for key in keys:
      row[key] += 1

  for found in missing:
    count(found.split, found.label, 'found', 'missing')
  for split, row in rows():
    said = {'dead': row['dead']} if 'dead' in row else _remarks(row)
    count(split, row['label'], 'found', *([] if 'dead' in row else ['usable']), *said)
    for key, why in said.items():
      lists[key][row['id']] = why
  across, within = _copies(rows)
  return {
    'total': {key: sum(r[key] for s in counts.values() for r in s.values()) for key in _COUNTS},
    'counts': {split: dict(sorted(by_class.items())) for split, by_class in sorted(counts.items())},
    **lists,
    'missing': [found.id for found in missing],
    'same_bytes_across_splits': across,
    'same_bytes_within_a_split': within,
    'notes': [*notes, *_gaps(counts)],
  }


def _remarks(row: Row) -> dict[str, str]:
  """What is to be said of a usable video."""
  said = {'damaged': row['damage']} if row['damage'] else {}
  return said | ({'short': f'{row["duration"]:.2f} s, {row["num_frames"]} frames'} if row['duration'] < SHORT else {})


def without_usable(report: Mapping[str, Any], class_names: Sequence[str]) -> list[str]:
  """The classes that no split has a usable video of."""
  usable = {name for by_class in report['counts'].values() for name, row in by_class.items() if row['usable']}
  return [name for name in class_names if name not in usable]


def _gaps(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
  """A line for each split that lacks some of the classes that others have."""
  labels = sorted({name for by_class in counts.values() for name in by_class if name})
  lines = []
  for split, by_class in counts.items():
    gone = [name for name in labels if not by_class.get(name, {}).get('usable')]
    if gone and any(by_class) and split != UNSPLIT:  # a split without labels has a gap alone
      more = f' and {len(gone) - 5} more' if len(gone) > 5 else ''
      lines.append(f'{split} has no usable video of: {", ".join(gone[:5])}{more}')
  return lines


def _copies(rows: Callable[[], Iterator[tuple[str, Row]]]) -> tuple[list[list[str]], list[list[str]]]:
  """Lists of videos with the same bytes, as 'split: id': first those that stand in two splits."""
  # Of each video eight bytes are held, and then the names of those that share them.
  marks = np.fromiter((int(row['sha256'][:16], 16) for _, row in rows() if 'dead' not in row), np.uint64)
  values, times = np.unique(marks, return_counts=True)
  again = set(values[times > 1].tolist())
  same = collections.defaultdict(list)
  for split, row in rows():
    if 'dead' not in row and int(row['sha256'][:16], 16) in again:
      same[row['sha256']].append((split, f'{split or UNSPLIT}: {row["id"]}'))
  across, within = [], []
  for copies in same.values():
    names = [name for _, name in copies]
    if len({split for split, _ in copies}) > 1:
      across.append(names)
    elif len(names) > 1:
      within.append(names)
  return across, within


def text(report: Mapping[str, Any], at_most: int | None = None) -> str:
  """The report to read; without `at_most`, all of it, and else few entries of each list."""
  lines = _table(report, at_most)
  sections = {
    'dead, left out': report['dead'],
    'missing, listed but not there': dict.fromkeys(report['missing'], ''),
    'damaged, kept': report['damaged'],
    f'shorter than {SHORT:g} s, kept': report['short'],
    'WARNING: the same bytes in two splits': {' = '.join(names): '' for names in report['same_bytes_across_splits']},
    'the same bytes twice in a split': {' = '.join(names): '' for names in report['same_bytes_within_a_split']},
    'notes': dict.fromkeys(report['notes'], ''),
  }
  for title, entries in sections.items():
    lines += section(title, entries, at_most)
  return '\n'.join(lines) + '\n'


def section(title: str, entries: Mapping[str, str], at_most: int | None = None) -> list[str]:
  """Lines on videos and why; of many, how often each reason is given comes first."""
  if not entries:
    return []
  lines = ['', f'{title} ({len(entries)}):']
  if len(entries) > (at_most or _FEW) and any(entries.values()):
    lines += [f'  {count} x {kind}' for kind, count in _kinds(entries).most_common(at_most)]
  lines += [f'  {name}: {why}' if why else f'  {name}' for name, why in itertools.islice(entries.items(), at_most)]
  if at_most is not None and len(entries) > at_most:
    lines.append(f'  and {len(entries) - at_most} more')
  return lines


def _kinds(entries: Mapping[str, str]) -> collections.Counter[str]:
  """How often each reason is given, whatever its numbers."""
  return collections.Counter(re.sub(r'\d+(\.\d+)?', 'N', why) for why in entries.values())


def _table(report: Mapping[str, Any], at_most: int | None) -> list[str]:
  """Counts of every split and class; of many classes only those that lose most, if cut."""
  counts = {split: dict(by_class) for split, by_class in report['counts'].items()}
  width = max([len(name) for by_class in counts.values() for name in by_class] + [7]) + 2
  cut = at_most is not None and max(map(len, counts.values()), default=0) > at_most
  lines = [f'{"":{width}}' + ''.join(f'{key:>9}' for key in _COUNTS)]
  for split, by_class in counts.items():
    total = {key: sum(row[key] for row in by_class.values()) for key in _COUNTS}
    lines.append(_line(split, total, width))
    if cut:
      worst = sorted(by_class.items(), key=lambda entry: entry[1]['usable'] / entry[1]['found'])
      by_class = {name: row for name, row in worst[:_FEW] if row['usable'] < row['found']}
    lines += [_line(f'  {name or "(no label)"}', row, width) for name, row in by_class.items()]
  lines.append(_line('total', report['total'], width))
  return [*lines, *(['(of each split the classes that lose most; report.txt has all)'] if cut else [])]


def _line(name: str, row: Mapping[str, int], width: int) -> str:
  return f'{name:{width}}' + ''.join(f'{row[key]:9}' for key in _COUNTS)


def save(report: Mapping[str, Any], directory: Path) -> None:
  """Writes report.json and report.txt."""
  (directory / 'report.json').write_text(json.dumps(report, indent=2, ensure_ascii=False) + '\n', 'utf-8')
  (directory / 'report.txt').write_text(text(report), 'utf-8')
