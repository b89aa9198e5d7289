"""What an evaluation leaves behind: results.json, predictions.csv, probabilities.npz, submission.csv."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.evaluation.protocol import Predictions


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
  top5 = predictions.ranked(5)
  hits = {'top1': top5[:, 0] == labels, 'top5': (top5 == labels[:, None]).any(axis=1)}
  for name, hit in hits.items():
    correct = int((hit & readable).sum())
    summary[f'{name}_correct'] = correct
    summary[name] = correct / max(1, int((labelled & readable).sum()))
    summary[f'{name}_unreadable_wrong'] = correct / int(labelled.sum())
  return summary


def write_results(
  folder: Path, predictions: Predictions, class_names: tuple[str, ...], about: dict[str, Any]
) -> dict[str, Any]:
  """Writes an evaluation's files into a folder, results.json last; returns what that holds.

  Where videos have no label there is a submission.csv too.
  """
  folder.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    folder / 'probabilities.npz',
    ids=predictions.ids,
    labels=predictions.labels,
    probabilities=predictions.probabilities,
    errors=predictions.errors,
  )
  _write_csv(folder / 'predictions.csv', predictions, class_names)
  if (predictions.labels < 0).any():
    write_submission(folder / 'submission.csv', predictions)
  results = {**summarise(predictions), **about}
  (folder / 'results.json.tmp').write_text(json.dumps(results, indent=2) + '\n')
  (folder / 'results.json.tmp').rename(folder / 'results.json')
  return results


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
