"""Report on a prepared dataset, as text and as JSON."""

import collections
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.datasets.builders.files import ListedVideo
from mevit_jax.datasets.tasks import Row
from mevit_jax.errors import printable
from mevit_jax.files import write_json, write_text

UNSPLIT = 'not split'
SHORT_SECONDS = 1.0
_COUNTS = ('listed', 'usable', 'damaged', 'short', 'unusable', 'missing')
_MAX_CLASSES = 10  # classes that a shortened table shows


def make(
  rows: Callable[[], Iterator[tuple[str, Row]]], missing: Sequence[ListedVideo] = (), notes: Sequence[str] = ()
) -> dict[str, Any]:
  """Returns a report: counts by split and class, reasons, duplicates.

  Args:
    rows: function that yields the split and row of every video whose file exists, unusable ones too.
    missing: videos whose file does not exist.
    notes: further remarks, one line each.
  """
  counts: dict[str, dict[str, dict[str, int]]] = {}
  lists: dict[str, dict[str, str]] = {'unusable': {}, 'damaged': {}, 'short': {}}

  def count(split: str, label: str, *keys: str) -> None:
    row = counts.setdefault(split or UNSPLIT, {}).setdefault(label, dict.fromkeys(_COUNTS, 0))
    for key in keys:
      row[key] += 1

  for video in missing:
    count(video.split, video.label, 'listed', 'missing')
  for split, row in rows():
    remarks = {'unusable': row['unusable']} if 'unusable' in row else _remarks(row)
    count(split, row['label'], 'listed', *([] if 'unusable' in row else ['usable']), *remarks)
    for key, reason in remarks.items():
      lists[key][row['id']] = reason
  duplicates = _find_duplicates(rows)
  return {
    'total': {key: sum(row[key] for classes in counts.values() for row in classes.values()) for key in _COUNTS},
    'counts': {split: dict(sorted(by_class.items())) for split, by_class in sorted(counts.items())},
    **lists,
    'missing': [video.id for video in missing],
    **duplicates,
    'notes': [*notes, *_absent_classes(counts)],
  }


def _remarks(row: Row) -> dict[str, str]:
  """Returns the remarks on a usable video: 'damaged', 'short', both or none."""
  remarks = {'damaged': row['damage']} if row['damage'] else {}
  if row['duration'] < SHORT_SECONDS:
    remarks['short'] = f'{row["duration"]:.2f} s, {row["num_frames"]} frames'
  return remarks


def without_usable(report: Mapping[str, Any], class_names: Sequence[str]) -> list[str]:
  """Returns the classes without a usable video in any split."""
  usable = {name for by_class in report['counts'].values() for name, row in by_class.items() if row['usable']}
  return [name for name in class_names if name not in usable]


def _absent_classes(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
  """Returns a line for each split that lacks classes which other splits have."""
  labels = sorted({name for by_class in counts.values() for name in by_class if name})
  lines = []
  for split, by_class in counts.items():
    absent = [name for name in labels if not by_class.get(name, {}).get('usable')]
    if absent and any(by_class) and split != UNSPLIT:  # a split without any labels lacks none
      more = f' and {len(absent) - 5} more' if len(absent) > 5 else ''
      lines.append(f'{split} has no usable video of: {", ".join(absent[:5])}{more}')
  return lines


def _find_duplicates(rows: Callable[[], Iterator[tuple[str, Row]]]) -> dict[str, list[list[str]]]:
  """Returns groups of videos with the same bytes, as 'split: id': across classes, across splits, within one."""
  # To save memory, only eight bytes of each digest are held, then the names of the videos that share them.
  prefixes = np.fromiter((int(row['sha256'][:16], 16) for _, row in rows() if 'unusable' not in row), np.uint64)
  values, occurrences = np.unique(prefixes, return_counts=True)
  repeated = set(values[occurrences > 1].tolist())
  groups = collections.defaultdict(list)
  for split, row in rows():
    if 'unusable' not in row and int(row['sha256'][:16], 16) in repeated:
      groups[row['sha256']].append((split, row['label'], f'{split or UNSPLIT}: {row["id"]}'))
  found: dict[str, list[list[str]]] = {
    'duplicates_across_classes': [],
    'duplicates_across_splits': [],
    'duplicates_within_split': [],
  }
  for copies in groups.values():
    splits, labels, names = zip(*copies, strict=True)
    if len({label for label in labels if label}) > 1:
      found['duplicates_across_classes'].append(list(names))
    if len(set(splits)) > 1:
      found['duplicates_across_splits'].append(list(names))
    elif len(names) > 1:
      found['duplicates_within_split'].append(list(names))
  return found


def text(report: Mapping[str, Any], max_entries: int | None = None) -> str:
  """Returns the report as text, with at most `max_entries` entries of each list."""
  lines = _table(report, max_entries)
  sections = {
    'unusable, left out': report['unusable'],
    'missing: listed, but without a file': dict.fromkeys(report['missing'], ''),
    'damaged, kept': report['damaged'],
    f'shorter than {SHORT_SECONDS:g} s, kept': report['short'],
    'WARNING: same bytes in two classes': {' = '.join(names): '' for names in report['duplicates_across_classes']},
    'WARNING: same bytes in two splits': {' = '.join(names): '' for names in report['duplicates_across_splits']},
    'same bytes twice in one split': {' = '.join(names): '' for names in report['duplicates_within_split']},
    'notes': dict.fromkeys(report['notes'], ''),
  }
  for title, entries in sections.items():
    lines += section(title, entries, max_entries)
  return '\n'.join(lines) + '\n'


def section(title: str, entries: Mapping[str, str], max_entries: int | None = None) -> list[str]:
  """Returns lines that list videos with reasons; a long list starts with the counts of similar reasons."""
  if not entries:
    return []
  lines = ['', f'{title} ({len(entries)}):']
  if len(entries) > (max_entries or _MAX_CLASSES) and any(entries.values()):
    lines += [f'  {count} x {reason}' for reason, count in _group_reasons(entries)[:max_entries]]
  shown = itertools.islice(entries.items(), max_entries)
  lines += [printable(f'  {name}: {reason}' if reason else f'  {name}') for name, reason in shown]
  if max_entries is not None and len(entries) > max_entries:
    lines.append(f'  and {len(entries) - max_entries} more')
  return lines


def _group_reasons(entries: Mapping[str, str]) -> list[tuple[str, int]]:
  """Groups reasons that differ in their numbers only: (reason with ranges, count), by falling count."""
  number = re.compile(r'\d+(?:\.\d+)?')
  groups = collections.defaultdict(list)
  for reason in entries.values():
    groups[tuple(number.split(reason))].append(number.findall(reason))
  found = []
  for words, numbers in groups.items():
    ranges = [_range(column) for column in zip(*numbers, strict=True)]
    found.append((''.join(itertools.chain(*itertools.zip_longest(words, ranges, fillvalue=''))), len(numbers)))
  return sorted(found, key=lambda group: -group[1])


def _range(numbers: Sequence[str]) -> str:
  low, high = min(numbers, key=float), max(numbers, key=float)
  return low if float(low) == float(high) else f'{low} to {high}'


def _table(report: Mapping[str, Any], max_entries: int | None) -> list[str]:
  """Returns the counts of every split and class; if there are too many classes, only those that lose most videos."""
  counts = {split: dict(by_class) for split, by_class in report['counts'].items()}
  width = max([len(name) for by_class in counts.values() for name in by_class] + [7]) + 2
  shortened = max_entries is not None and max(map(len, counts.values()), default=0) > max_entries
  lines = [f'{"":{width}}' + ''.join(f'{key:>9}' for key in _COUNTS)]
  for split, by_class in counts.items():
    total = {key: sum(row[key] for row in by_class.values()) for key in _COUNTS}
    lines.append(_line(split, total, width))
    if shortened:
      worst = sorted(by_class.items(), key=lambda entry: entry[1]['usable'] / entry[1]['listed'])
      by_class = {name: row for name, row in worst[:_MAX_CLASSES] if row['usable'] < row['listed']}
    lines += [_line(f'  {name or "(no label)"}', row, width) for name, row in by_class.items()]
  lines.append(_line('total', report['total'], width))
  return [*lines, *(['(only the classes that lose most videos; report.txt has all)'] if shortened else [])]


def _line(name: str, row: Mapping[str, int], width: int) -> str:
  return f'{name:{width}}' + ''.join(f'{row[key]:9}' for key in _COUNTS)


def save(report: Mapping[str, Any], directory: Path) -> None:
  """Writes report.json and report.txt."""
  write_json(directory / 'report.json', report)
  write_text(directory / 'report.txt', text(report))
