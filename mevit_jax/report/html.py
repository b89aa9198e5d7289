"""HTML report of an evaluation: one self-contained file without network access."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.evaluation import metrics
from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.evaluation.results import calibration
from mevit_jax.files import read_metrics, write_text
from mevit_jax.report import figures
from mevit_jax.report.examples import Example

_MAX_LABELED_CLASSES = 20  # of a confusion matrix with class names and counts
_MAX_PAIRS = 25
_METADATA = ('protocol', 'clip', 'preprocessing', 'dataset', 'checkpoint', 'versions')
_METRICS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy', 'mean_class': 'Mean class accuracy'}


@dataclasses.dataclass(frozen=True)
class Section:
  """Additional section of the report, such as attention maps.

  Attributes:
    title: heading.
    text: description in a sentence or two.
    images: (image uint8 `h w 3`, caption) pairs.
  """

  title: str
  text: str
  images: Sequence[tuple[np.ndarray, str]]


def write_report(
  path: Path,
  results: dict[str, Any],
  predictions: Predictions,
  class_names: tuple[str, ...],
  *,
  examples: Sequence[tuple[str, Example]] = (),
  metrics_file: Path | None = None,
  sections: Sequence[Section] = (),
) -> None:
  """Writes the report.

  Args:
    path: file to write.
    results: contents of results.json.
    predictions: predictions of the evaluation.
    class_names: class i is the i-th name.
    examples: (video id, example) pairs, chosen by `choose_worst`.
    metrics_file: metrics.jsonl of the run, which may be missing.
    sections: additional sections.
  """
  import jinja2  # slow to import

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names of classes and videos are untrusted
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters['percent'] = lambda fraction, digits=1: f'{100 * fraction:.{digits}f}\u2009%'
  counted = (predictions.labels >= 0) & predictions.readable
  metrics_present = {key: name for key, name in _METRICS.items() if key in results}
  page = environment.get_template('page.html').render(
    results=results,
    headlines=[(name, results[key], results[f'{key}_interval']) for key, name in metrics_present.items()],
    unreadable_wrong=[(name, results[f'{key}_unreadable_wrong']) for key, name in metrics_present.items()],
    learning_curves=_learning_curves(metrics_file, results) if metrics_file and metrics_file.exists() else {},
    confusion=_confusion(predictions, counted, class_names) if counted.any() else None,
    reliability=figures.reliability_diagram(calibration(predictions)) if counted.any() else None,
    has_mistakes=results.get('top1_correct', 0) < int(counted.sum()),
    examples=[(video, example, figures.film_strip_jpeg(example.frames)) for video, example in examples],
    sections=[
      (section, [(figures.image_png(image), caption) for image, caption in section.images]) for section in sections
    ],
    metadata=list(_flatten({key: results[key] for key in _METADATA})),
  )
  write_text(path, page)


def _confusion(predictions: Predictions, counted: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
  """Computes the confusion matrix, the most confused pairs and the metrics of each class."""
  labels, probabilities = predictions.labels[counted], predictions.probabilities[counted]
  matrix = metrics.confusion_matrix(labels, metrics.ranked(probabilities, 1)[:, 0], len(names))  # c c
  order = metrics.cluster_classes(labels, probabilities)
  ordered, ordered_names = matrix[np.ix_(order, order)], [names[i] for i in order]
  labeled = len(names) <= _MAX_LABELED_CLASSES
  rows, columns = np.nonzero(ordered)
  return {
    'image': figures.confusion_matrix_with_counts(ordered, ordered_names)
    if labeled
    else figures.confusion_matrix_pixels(ordered),
    'labeled': labeled,
    # Shown for the cell at the pointer.
    'cells': {
      'names': ordered_names,
      'totals': ordered.sum(axis=1).tolist(),
      'counts': np.stack([rows, columns, ordered[rows, columns]], axis=1).tolist(),
    },
    'pairs': _confused_pairs(matrix, names),
    'classes': _per_class(matrix, names),
  }


def _confused_pairs(matrix: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
  """Lists the most confused pairs of classes."""
  wrong = matrix * ~np.eye(len(matrix), dtype=bool)
  totals = matrix.sum(axis=1)
  largest = np.argsort(-wrong, axis=None, kind='stable')[:_MAX_PAIRS]
  return [
    {'label': names[i], 'predicted': names[j], 'count': int(wrong[i, j]), 'total': int(totals[i])}
    for i, j in zip(*np.unravel_index(largest, wrong.shape), strict=True)
    if wrong[i, j]
  ]


def _per_class(matrix: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
  """Computes accuracy (recall) with its interval, precision, and the most frequent wrong prediction of each class."""
  rows = []
  for i, name in enumerate(names):
    total, correct, predicted = int(matrix[i].sum()), int(matrix[i, i]), int(matrix[:, i].sum())
    wrong = np.where(np.arange(len(names)) == i, 0, matrix[i])
    most = int(wrong.argmax())
    rows.append({
      'name': name,
      'videos': total,
      'recall': correct / total if total else None,
      'interval': metrics.wilson_interval(correct, total),
      'precision': correct / predicted if predicted else None,
      'confused_with': f'{names[most]} ({wrong[most]})' if wrong[most] else '',
    })  # fmt: skip
  return rows


def _learning_curves(path: Path, results: dict[str, Any]) -> dict[str, str]:
  """Draws loss and accuracy by step, including the accuracy of this evaluation."""
  series: dict[str, dict[int, float]] = {}
  for line in read_metrics(path):
    for name, value in line.items():
      if name in ('train/loss', 'train/accuracy') or name.endswith('/top1'):
        series.setdefault(name, {})[line['step']] = np.nan if value is None else value
  if 'top1' in results:  # metrics.jsonl may not have it yet
    protocol, step = results['protocol']['name'], results['checkpoint']['step']
    series.setdefault(f'{protocol}/top1', {})[step] = results['top1']
  curves = {}
  if 'train/loss' in series:
    curves['training loss'] = figures.learning_curve({'training loss': series.pop('train/loss')}, 'training loss')
  if series:
    named = {name.removesuffix('/top1').replace('train/accuracy', 'training clips'): x for name, x in series.items()}
    percent = {name: {step: 100 * fraction for step, fraction in points.items()} for name, points in named.items()}
    curves['top-1 accuracy'] = figures.learning_curve(percent, 'top-1 accuracy (%)')
  return curves


def _flatten(values: dict[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the leaves of nested dicts by dotted path."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value
