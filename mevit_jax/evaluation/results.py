"""Files of an evaluation: results.json, predictions.csv, logits.npz, submission.csv."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import typing
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.config.evaluation import Average
from mevit_jax.errors import UserError
from mevit_jax.evaluation import metrics
from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.files import atomic_path, writing
from mevit_jax.parallel.distributed import is_main_process


def summarize(predictions: Predictions) -> dict[str, Any]:
  """Computes counts, accuracy with confidence intervals, and calibration.

  Accuracy is over labeled readable videos; `..._unreadable_wrong` counts unreadable ones as wrong. Without any labeled
  video there are only counts.
  """
  labels, readable = predictions.labels, predictions.readable
  labeled = labels >= 0
  summary: dict[str, Any] = {
    'videos': len(labels),
    'unlabeled': int((~labeled).sum()),
    'unreadable': int((~readable).sum()),
    'unreadable_videos': dict(
      zip(predictions.ids[~readable].tolist(), predictions.errors[~readable].tolist(), strict=True)
    ),
  }
  if not labeled.any():
    return summary
  counted = labeled & readable
  hits = {name: hit & counted for name, hit in metrics.hits(predictions.probabilities, labels).items()}
  total = int(counted.sum())
  for name, hit in hits.items():
    count = int(hit.sum())
    summary[f'{name}_correct'] = count
    summary[name] = count / max(1, total)
    summary[f'{name}_interval'] = metrics.wilson_interval(count, total)
    summary[f'{name}_unreadable_wrong'] = count / int(labeled.sum())
  correct, counted_labels = hits['top1'][counted], labels[counted]
  summary['loss'] = metrics.cross_entropy(predictions.probabilities[counted], counted_labels)
  summary['mean_class'] = metrics.mean_class_accuracy(counted_labels, correct)
  summary['mean_class_interval'] = metrics.mean_class_interval(counted_labels, correct)
  summary['mean_class_unreadable_wrong'] = metrics.mean_class_accuracy(labels[labeled], hits['top1'][labeled])
  if total:
    summary['most_predicted'] = _most_predicted(predictions.ranked(1)[counted, 0], counted_labels)
  summary['intervals'] = {
    'level': 0.95, 'top1': 'Wilson', 'top5': 'Wilson', 'mean_class': 'from the Wilson intervals of the classes (MOVER)',
  }  # fmt: skip
  summary['calibration'] = {
    'ece': calibration(predictions).error,
    'binning': f'{metrics.BINS} bins of equal width',
    'mean_confidence': float(predictions.probabilities[counted].max(axis=1).mean()) if total else 0.0,
  }
  summary['averages'] = {average: _accuracy(predictions, average, counted) for average in typing.get_args(Average)}
  return summary


def _most_predicted(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Returns the class id that is predicted most often, and its fractions of the predictions and of the labels."""
  most = int(np.bincount(predicted).argmax())
  return {
    'class_id': most,
    'fraction': float((predicted == most).mean()),
    'label_fraction': float((labels == most).mean()),
  }


def calibration(predictions: Predictions) -> metrics.Calibration:
  """Bins the labeled readable videos by confidence."""
  counted = (predictions.labels >= 0) & predictions.readable
  probabilities, labels = predictions.probabilities[counted], predictions.labels[counted]
  return metrics.calibrate(probabilities.max(axis=1), metrics.hits(probabilities, labels)['top1'])


def _accuracy(predictions: Predictions, average: Average, counted: np.ndarray) -> dict[str, float]:
  """Computes top-1 and top-5 accuracy with another average over views."""
  probabilities = dataclasses.replace(predictions, average=average).probabilities
  hits = metrics.hits(probabilities, predictions.labels)
  return {name: int((hit & counted).sum()) / max(1, int(counted.sum())) for name, hit in hits.items()}


def write_results(
  folder: Path, predictions: Predictions, class_names: tuple[str, ...], metadata: dict[str, Any]
) -> dict[str, Any]:
  """Writes the files of an evaluation on the main process, results.json last; returns the contents of results.json.

  Videos without labels are also written to submission.csv. Earlier results and figures in the folder are deleted, and
  the other files replaced when all are written.

  Args:
    folder: folder of the evaluation, created if needed.
    predictions: predictions for a split.
    class_names: class i is the i-th name.
    metadata: further entries of results.json: protocol, dataset, checkpoint, versions.

  Raises:
    UserError: a file cannot be written.
  """
  results = {**summarize(predictions), **metadata}
  if not is_main_process():
    return results
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ('results.json', 'report.html', 'videos.png'):  # results.json marks a complete evaluation
      (folder / name).unlink(missing_ok=True)
  with contextlib.ExitStack() as stack:  # the files get their names at its end, the first one last

    def new(name: str) -> Path:
      return stack.enter_context(atomic_path(folder / name))

    text = json.dumps(results, indent=2) + '\n'
    new('results.json').write_text(text, encoding='utf-8')
    _write_logits(new('logits.npz'), predictions, class_names, _checksum(text.encode()))
    _write_csv(new('predictions.csv'), predictions, class_names)
    if (predictions.labels < 0).any():
      new('submission.csv').write_text(format_submission(predictions), encoding='utf-8')
  return results


def read_results(folder: Path) -> tuple[dict[str, Any], Predictions, tuple[str, ...]]:
  """Reads an evaluation's folder: contents of results.json, predictions, class names.

  Raises:
    UserError: a file is missing or damaged.
  """
  for name in ('results.json', 'logits.npz'):
    if not (folder / name).is_file():
      raise UserError(f'the evaluation in {folder} is incomplete: {name} is missing; evaluate again')
  results = read_summary(folder)
  try:
    # np.load leaves a damaged file open if it opens the file itself.
    with (folder / 'logits.npz').open('rb') as file, np.load(file) as arrays:
      names = tuple(arrays['class_names'].tolist())
      ids, labels, logits, errors = (arrays[name] for name in ('ids', 'labels', 'logits', 'errors'))
      return results, Predictions(ids, labels, logits, errors, arrays['average'].item()), names
  except Exception as error:  # NumPy and zipfile raise errors of any type for damaged files
    raise UserError(f'the evaluation in {folder} is damaged, evaluate again: {error}') from error


def read_summary(folder: Path) -> dict[str, Any]:
  """Reads the results.json of an evaluation, whose checksum is in logits.npz.

  Raises:
    UserError: it is damaged.
  """
  try:
    data = (folder / 'results.json').read_bytes()
    results = json.loads(data.decode())
    if (folder / 'logits.npz').exists():  # else it was deleted, to save space
      with (folder / 'logits.npz').open('rb') as file, np.load(file) as arrays:
        if arrays['results_sha256'].item() != _checksum(data):
          raise ValueError('results.json does not match its checksum in logits.npz')
  except Exception as error:  # NumPy and zipfile raise errors of any type for damaged files
    raise UserError(f'the evaluation in {folder} is damaged, evaluate again: {error}') from error
  return results


def _checksum(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _write_logits(path: Path, predictions: Predictions, class_names: tuple[str, ...], checksum: str) -> None:
  with path.open('wb') as file:
    np.savez(
      file,
      ids=predictions.ids,
      labels=predictions.labels,
      logits=predictions.logits,
      errors=predictions.errors,
      class_names=np.asarray(class_names),
      average=predictions.average,
      results_sha256=checksum,
    )


def _write_csv(path: Path, predictions: Predictions, class_names: tuple[str, ...]) -> None:
  top5 = predictions.ranked(5)
  with path.open('w', newline='', encoding='utf-8') as file:
    writer = csv.writer(file)
    writer.writerow(['id', 'label', 'prediction', 'confidence', 'correct', 'top5', 'error'])
    for i, video in enumerate(predictions.ids):
      label = int(predictions.labels[i])
      name = class_names[label] if label >= 0 else ''
      if not predictions.readable[i]:
        writer.writerow([video, name, '', '', '', '', predictions.errors[i]])
        continue
      best = int(top5[i, 0])
      confidence = f'{predictions.probabilities[i, best]:.4f}'
      names = '|'.join(class_names[k] for k in top5[i])
      correct = int(best == label) if label >= 0 else ''
      writer.writerow([video, name, class_names[best], confidence, correct, names, ''])


def format_submission(predictions: Predictions) -> str:
  """Formats the readable unlabeled videos for Something-Something-v2's test server.

  Each line has the video's number (the part of its id after the last slash) and the top 5 class ids, separated by
  semicolons, without a header, as in the dataset's baseline (github.com/TwentyBN/something-something-v2-baseline).
  """
  top5 = predictions.ranked(5)
  lines = [
    ';'.join([str(predictions.ids[i]).rpartition('/')[2], *map(str, top5[i])]) + '\n'
    for i in np.flatnonzero((predictions.labels < 0) & predictions.readable)
  ]
  return ''.join(lines)
