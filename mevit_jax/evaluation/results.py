"""What an evaluation leaves behind: results.json, predictions.csv, logits.npz, submission.csv."""

import csv
import dataclasses
import json
import typing
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.config.evaluation import Average
from mevit_jax.errors import UserError
from mevit_jax.evaluation import metrics
from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.files import write_json
from mevit_jax.parallel.distributed import is_main_process


def summarise(predictions: Predictions) -> dict[str, Any]:
  """Counts, and accuracy over the videos that have a label: over the readable ones, and with the others as wrong.

  There is no accuracy where no video has a label.
  """
  labels, readable = predictions.labels, predictions.readable
  labelled = labels >= 0
  summary: dict[str, Any] = {
    'videos': len(labels),
    'unlabelled': int((~labelled).sum()),
    'unreadable': int((~readable).sum()),
    'unreadable_videos': dict(
      zip(predictions.ids[~readable].tolist(), predictions.errors[~readable].tolist(), strict=True)
    ),
  }
  if not labelled.any():
    return summary
  counted = labelled & readable
  hits = {name: hit & counted for name, hit in metrics.hits(predictions.probabilities, labels).items()}
  for name, hit in hits.items():
    correct, total = int(hit.sum()), int(counted.sum())
    summary[f'{name}_correct'] = correct
    summary[name] = correct / max(1, total)
    summary[f'{name}_interval'] = metrics.wilson(correct, total)
    summary[f'{name}_unreadable_wrong'] = correct / int(labelled.sum())
  right, of = hits['top1'][counted], labels[counted]
  summary['mean_class'] = metrics.mean_class_accuracy(of, right)
  summary['mean_class_interval'] = (
    metrics.bootstrap(lambda times: metrics.mean_class_accuracy(of, right, times), len(of)) if len(of) else (0.0, 1.0)
  )
  summary['mean_class_unreadable_wrong'] = metrics.mean_class_accuracy(labels[labelled], hits['top1'][labelled])
  summary['intervals'] = {
    'level': 0.95, 'top1': 'Wilson', 'top5': 'Wilson', 'mean_class': 'bootstrap over videos, 1000 resamples',
  }  # fmt: skip
  summary['calibration'] = {
    'ece': calibration_of(predictions).error,
    'binning': f'{metrics.BINS} bins of equal width',
    'mean_confidence': float(predictions.probabilities[counted].max(axis=1).mean()) if len(of) else 0.0,
  }
  summary['averages'] = {average: _accuracy(predictions, average, counted) for average in typing.get_args(Average)}
  return summary


def calibration_of(predictions: Predictions) -> metrics.Calibration:
  """Of the videos that can be read and have a label."""
  counted = (predictions.labels >= 0) & predictions.readable
  probabilities, labels = predictions.probabilities[counted], predictions.labels[counted]
  return metrics.calibrate(probabilities.max(axis=1), metrics.hits(probabilities, labels)['top1'])


def _accuracy(predictions: Predictions, average: Average, counted: np.ndarray) -> dict[str, float]:
  """With another average over the views."""
  probabilities = dataclasses.replace(predictions, average=average).probabilities
  hits = metrics.hits(probabilities, predictions.labels)
  return {name: int((hit & counted).sum()) / max(1, int(counted.sum())) for name, hit in hits.items()}


def write_results(
  folder: Path, predictions: Predictions, class_names: tuple[str, ...], about: dict[str, Any]
) -> dict[str, Any]:
  """Writes an evaluation's files into a folder, by one process, results.json last; returns what that holds.

  Where videos have no label there is a submission.csv too. Older results and pictures go.
  """
  results = {**summarise(predictions), **about}
  if not is_main_process():
    return results
  folder.mkdir(parents=True, exist_ok=True)
  for name in ('results.json', 'report.html', 'videos.png'):  # where results.json is, the other files are its own
    (folder / name).unlink(missing_ok=True)
  np.savez(
    folder / 'logits.npz',
    ids=predictions.ids,
    labels=predictions.labels,
    logits=predictions.logits,
    errors=predictions.errors,
    class_names=np.asarray(class_names),
    average=predictions.average,
  )
  _write_csv(folder / 'predictions.csv', predictions, class_names)
  if (predictions.labels < 0).any():
    write_submission(folder / 'submission.csv', predictions)
  write_json(folder / 'results.json', results)
  return results


def read_results(folder: Path) -> tuple[dict[str, Any], Predictions, tuple[str, ...]]:
  """What `write_results` has written: what results.json holds, the predictions, and the names of the classes.

  Raises:
    UserError: the files are not there, or damaged.
  """
  for name in ('results.json', 'logits.npz'):
    if not (folder / name).is_file():
      raise UserError(f'{folder} holds no whole evaluation: {name} is not there; evaluate again')
  try:
    results = json.loads((folder / 'results.json').read_text())
    # Opened here: NumPy leaves a damaged file open.
    with (folder / 'logits.npz').open('rb') as file, np.load(file) as arrays:
      names = tuple(arrays['class_names'].tolist())
      ids, labels, logits, errors = (arrays[name] for name in ('ids', 'labels', 'logits', 'errors'))
      return results, Predictions(ids, labels, logits, errors, arrays['average'].item()), names
  except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'the evaluation in {folder} is damaged, evaluate again: {error}') from error


def _write_csv(path: Path, predictions: Predictions, class_names: tuple[str, ...]) -> None:
  ranked = predictions.ranked(5)
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['id', 'label', 'prediction', 'confidence', 'correct', 'top5', 'error'])
    for i, video in enumerate(predictions.ids):
      label = int(predictions.labels[i])
      name = class_names[label] if label >= 0 else ''
      if not predictions.readable[i]:
        writer.writerow([video, name, '', '', '', '', predictions.errors[i]])
        continue
      best = int(ranked[i, 0])
      confidence = f'{predictions.probabilities[i, best]:.4f}'
      top5 = '|'.join(class_names[k] for k in ranked[i])
      correct = int(best == label) if label >= 0 else ''
      writer.writerow([video, name, class_names[best], confidence, correct, top5, ''])


def write_submission(path: Path, predictions: Predictions) -> None:
  """Writes the readable videos without label as Something-Something-v2's test server reads them.

  A line a video: its number (what follows the last slash of its id) and the five likeliest class ids, with semicolons
  between and no header, as the dataset's own baseline writes it (github.com/TwentyBN/something-something-v2-baseline).
  """
  ranked = predictions.ranked(5)
  with path.open('w') as file:
    for i in np.flatnonzero((predictions.labels < 0) & predictions.readable):
      video = str(predictions.ids[i]).rpartition('/')[2]
      file.write(';'.join([video, *map(str, ranked[i])]) + '\n')
