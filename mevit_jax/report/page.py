"""report.html: an evaluation as one page that needs no network and no other file."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.evaluation import metrics
from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.evaluation.results import calibration_of
from mevit_jax.report import figures
from mevit_jax.report.strips import Strip

_FEW = 20  # classes whose confusion is drawn with names and counts in it
_PAIRS = 25
_ABOUT = ('protocol', 'clip', 'preprocessing', 'dataset', 'checkpoint', 'versions')
_LABELS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy', 'mean_class': 'Mean class accuracy'}


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page that others make, such as where attention looks.

  Attributes:
    title: its heading.
    text: what it shows, in a sentence or two.
    pictures: uint8 `h w 3` each, with the words under it.
  """

  title: str
  text: str
  pictures: Sequence[tuple[np.ndarray, str]]


def choose_worst(predictions: Predictions, count: int = 12) -> list[int]:
  """The most confident mistakes; the least confident of the right ones, or of all, where there is no mistake."""
  labelled = predictions.labels >= 0
  wrong = labelled & (predictions.ranked(1)[:, 0] != predictions.labels) & predictions.readable
  confidence = predictions.probabilities.max(axis=1)
  shown = wrong if wrong.any() else predictions.readable
  order = np.argsort(-confidence if wrong.any() else confidence, kind='stable')
  return [int(i) for i in order if shown[i]][:count]


def write_page(
  path: Path,
  results: dict[str, Any],
  predictions: Predictions,
  class_names: tuple[str, ...],
  *,
  strips: Sequence[tuple[str, Strip]] = (),
  metrics_file: Path | None = None,
  sections: Sequence[Section] = (),
) -> None:
  """Writes the page.

  Args:
    path: of the page.
    results: what results.json holds.
    predictions: that they are of.
    class_names: label i is the i-th name.
    strips: the videos of `choose_worst`, with their ids.
    metrics_file: the run's metrics.jsonl, if there is one.
    sections: more of it.
  """
  import jinja2  # takes a while: only where a page is written

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names of classes and videos are anyone's
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters['percent'] = lambda share, digits=1: f'{100 * share:.{digits}f}\u2009%'
  counted = (predictions.labels >= 0) & predictions.readable
  page = environment.get_template('page.html').render(
    results=results,
    headlines=[(name, results[key], results[f'{key}_interval']) for key, name in _LABELS.items() if key in results],
    unreadable_wrong=[(name, results[f'{key}_unreadable_wrong']) for key, name in _LABELS.items() if key in results],
    curves=_curves(metrics_file, results) if metrics_file and metrics_file.exists() else {},
    confusion=_confusion(predictions, counted, class_names) if counted.any() else None,
    reliability=figures.reliability(calibration_of(predictions)) if counted.any() else None,
    mistakes=results.get('top1_correct', 0) < int(counted.sum()),
    strips=[(video, strip, figures.film_strip(strip.frames)) for video, strip in strips],
    sections=[
      (section, [(figures.picture(image), caption) for image, caption in section.pictures]) for section in sections
    ],
    about=list(_flat({key: results[key] for key in _ABOUT})),
  )
  temporary = path.with_suffix('.tmp')
  temporary.write_text(page)
  temporary.rename(path)


def _confusion(predictions: Predictions, counted: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
  """The matrix, its most confused pairs, and a row a class."""
  labels, probabilities = predictions.labels[counted], predictions.probabilities[counted]
  matrix = metrics.confusion(labels, metrics.ranked(probabilities, 1)[:, 0], len(names))  # c c
  order = metrics.similar_together(labels, probabilities)
  ordered, ordered_names = matrix[np.ix_(order, order)], [names[i] for i in order]
  few = len(names) <= _FEW
  rows, columns = np.nonzero(ordered)
  return {
    'picture': figures.few_classes(ordered, ordered_names) if few else figures.many_classes(ordered),
    'few': few,
    # What the page looks up where the pointer is.
    'cells': {
      'names': ordered_names,
      'totals': ordered.sum(axis=1).tolist(),
      'counts': np.stack([rows, columns, ordered[rows, columns]], axis=1).tolist(),
    },
    'pairs': _pairs(matrix, names),
    'classes': _classes(matrix, names),
  }


def _pairs(matrix: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
  """The classes most often taken for another one."""
  wrong = matrix * ~np.eye(len(matrix), dtype=bool)
  totals = matrix.sum(axis=1)
  first = np.argsort(-wrong, axis=None, kind='stable')[:_PAIRS]
  return [
    {'label': names[i], 'said': names[j], 'count': int(wrong[i, j]), 'total': int(totals[i])}
    for i, j in zip(*np.unravel_index(first, wrong.shape), strict=True)
    if wrong[i, j]
  ]


def _classes(matrix: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
  """A row a class: how often it is recognised, how often said, and what it is taken for most often."""
  rows = []
  for i, name in enumerate(names):
    total, right, said = int(matrix[i].sum()), int(matrix[i, i]), int(matrix[:, i].sum())
    others = np.where(np.arange(len(names)) == i, 0, matrix[i])
    taken = int(others.argmax())
    rows.append({
      'name': name,
      'videos': total,
      'recall': right / total if total else None,
      'interval': metrics.wilson(right, total),
      'precision': right / said if said else None,
      'taken': f'{names[taken]} ({others[taken]})' if others[taken] else '',
    })  # fmt: skip
  return rows


def _curves(path: Path, results: dict[str, Any]) -> dict[str, str]:
  """Loss and accuracy over the steps, with the accuracy that the page is about."""
  series: dict[str, dict[int, float]] = {}
  for line in _lines(path):
    for name, value in line.items():
      if name in ('train/loss', 'train/accuracy') or name.endswith('/top1'):
        series.setdefault(name, {})[line['step']] = np.nan if value is None else value
  if 'top1' in results:  # this one may not be written there yet
    protocol, step = results['protocol']['name'], results['checkpoint']['step']
    series.setdefault(f'{protocol}/top1', {})[step] = results['top1']
  found = {}
  if 'train/loss' in series:
    found['training loss'] = figures.curves({'training loss': series.pop('train/loss')}, 'training loss')
  if series:
    named = {name.removesuffix('/top1').replace('train/accuracy', 'training clips'): x for name, x in series.items()}
    percent = {name: {step: 100 * share for step, share in points.items()} for name, points in named.items()}
    found['top-1 accuracy'] = figures.curves(percent, 'top-1 accuracy (%)')
  return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
  """The lines that were written to the end: the last one may have been cut."""
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      yield json.loads(line)


def _flat(values: dict[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value
