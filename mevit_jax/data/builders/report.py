"""What preparation found: a report for people (text) and for programs (JSON)."""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.data.builders.files import Item

UNSPLIT = 'not split'
_COUNTS = ('found', 'usable', 'damaged', 'dead')


def make(items: Sequence[Item], splits: Mapping[str, Sequence[Item]], notes: Sequence[str] = ()) -> dict[str, Any]:
  """Counts, reasons and copies.

  Args:
    items: every video found, dead ones too.
    splits: where the usable ones went.
    notes: what else there is to say.
  """
  places = {item.found.id: name for name, rows in splits.items() for item in rows}
  counts: dict[str, dict[str, dict[str, int]]] = {}
  for item in items:
    split = places.get(item.found.id) or item.found.split or UNSPLIT
    row = counts.setdefault(split, {}).setdefault(item.found.label, dict.fromkeys(_COUNTS, 0))
    row['found'] += 1
    row['dead' if item.examined.dead else 'usable'] += 1
    row['damaged'] += bool(item.examined.damage and not item.examined.dead)
  labels = sorted({item.found.label for item in items})
  gaps = [
    f'{split} has no usable video of: {", ".join(missing)}'
    for split in splits
    if (missing := [name for name in labels if not counts[split].get(name, {}).get('usable')])
  ]
  across, within = _copies(splits)
  return {
    'total': {key: sum(r[key] for s in counts.values() for r in s.values()) for key in _COUNTS},
    'counts': {split: dict(sorted(rows.items())) for split, rows in sorted(counts.items())},
    'dead': {i.found.id: i.examined.dead for i in items if i.examined.dead},
    'damaged': {i.found.id: i.examined.damage for i in items if i.examined.damage and not i.examined.dead},
    'same_bytes_across_splits': across,
    'same_bytes_within_a_split': within,
    'notes': [*notes, *gaps],
  }


def _copies(splits: Mapping[str, Sequence[Item]]) -> tuple[list[list[str]], list[list[str]]]:
  """Lists of videos with the same bytes, as 'split: id'."""
  same = collections.defaultdict(list)
  for split, rows in splits.items():
    for item in rows:
      same[item.examined.sha256].append((split, f'{split}: {item.found.id}'))
  across, within = [], []
  for copies in same.values():
    names = [name for _, name in copies]
    if len({split for split, _ in copies}) > 1:
      across.append(names)
    elif len(names) > 1:
      within.append(names)
  return across, within


def text(report: Mapping[str, Any], at_most: int | None = None) -> str:
  """The report to read; lists are cut after `at_most` entries."""
  width = max([len(name) for rows in report['counts'].values() for name in rows] + [7])
  lines = []
  for split, rows in report['counts'].items():
    lines.append(f'{split:{width}}' + ''.join(f'{key:>9}' for key in _COUNTS))
    lines += [f'  {name:{width - 2}}' + ''.join(f'{row[key]:9}' for key in _COUNTS) for name, row in rows.items()]
  lines.append(f'{"total":{width}}' + ''.join(f'{report["total"][key]:9}' for key in _COUNTS))
  sections = {
    'dead, left out': [f'{name}: {why}' for name, why in report['dead'].items()],
    'damaged, kept': [f'{name}: {why}' for name, why in report['damaged'].items()],
    'WARNING: the same bytes in two splits': [' = '.join(names) for names in report['same_bytes_across_splits']],
    'the same bytes twice in a split': [' = '.join(names) for names in report['same_bytes_within_a_split']],
    'notes': report['notes'],
  }
  for title, entries in sections.items():
    if entries:
      lines += ['', f'{title} ({len(entries)}):', *(f'  {entry}' for entry in entries[:at_most])]
      if at_most is not None and len(entries) > at_most:
        lines.append(f'  and {len(entries) - at_most} more')
  return '\n'.join(lines) + '\n'


def save(report: Mapping[str, Any], directory: Path) -> None:
  """Writes report.json and report.txt."""
  (directory / 'report.json').write_text(json.dumps(report, indent=2, ensure_ascii=False) + '\n')
  (directory / 'report.txt').write_text(text(report))
