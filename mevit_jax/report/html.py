"""HTML report of an evaluation: one self-contained file without network access."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.evaluation import metrics
from mevit_jax.evaluation.diagnosis import diagnose
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
  lines = _read_metrics(metrics_file, results)
  metrics_present = {key: name for key, name in _METRICS.items() if key in results}
  page = environment.get_template('page.html').render(
    results=results,
    headlines=[(name, results[key], results[f'{key}_interval']) for key, name in metrics_present.items()],
    unreadable_wrong=[(name, results[f'{key}_unreadable_wrong']) for key, name in metrics_present.items()],
    classes=len(class_names),
    learning_curves=_learning_curves(lines, results, len(class_names)) if lines else {},
    findings=diagnose(results, lines, class_names) if metrics_present else [],
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


def _read_metrics(path: Path | None, results: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl up to the evaluated checkpoint; none without the file."""
  last = results['checkpoint']['step']
  return [line for line in read_metrics(path) if line['step'] <= last] if path else []


def _learning_curves(lines: Sequence[dict[str, Any]], results: dict[str, Any], classes: int) -> dict[str, str]:
  """Draws loss and top-1 accuracy of training and evaluations by step, beside guessing and the baselines."""
  curves: dict[str, dict[str, dict[int, float]]] = {'loss': {}, 'top-1 accuracy': {}}

  def add(step: int, name: str, value: float | None) -> None:
    protocol, _, key = name.rpartition('/')
    curve = 'loss' if key == 'loss' else 'top-1 accuracy'
    if key in (('loss', 'accuracy') if protocol == 'train' else ('loss', 'top1')):
      series = 'training clips' if protocol == 'train' else protocol
      curves[curve].setdefault(series, {})[step] = np.nan if value is None else value

  for line in lines:
    for name, value in line.items():
      add(line['step'], name, value)
  for key in ('top1', 'loss'):  # metrics.jsonl may not have this evaluation yet
    if key in results:
      add(results['checkpoint']['step'], f'{results["protocol"]["name"]}/{key}', results[key])
  references = {'guessing': 1 / classes}
  names = {'majority': 'majority class', 'linear': 'linear baseline'}
  references |= {names[kind]: baseline['top1'] for kind, baseline in results.get('baselines', {}).items()}
  drawn = {}
  if curves['loss']:
    drawn['loss'] = figures.learning_curve(curves['loss'], 'loss', {f'guessing (ln {classes})': math.log(classes)})
  if curves['top-1 accuracy']:
    percent = {
      name: {step: 100 * fraction for step, fraction in points.items()}
      for name, points in curves['top-1 accuracy'].items()
    }
    levels = {name: 100 * value for name, value in references.items()}
    drawn['top-1 accuracy'] = figures.learning_curve(percent, 'top-1 accuracy (%)', levels)
  return drawn


def _flatten(values: dict[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the leaves of nested dicts by dotted path."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value
