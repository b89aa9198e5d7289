"""What an evaluation leaves behind: results.json, predictions.csv, probabilities.npz."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.parallel.distributed import is_first


def summarise(predictions: Predictions) -> dict[str, Any]:
  """Accuracy over the videos that can be read, and with the others counted as wrong; and the counts behind both."""
  labels, readable = predictions.labels, predictions.readable
  top5 = predictions.ranked(5)
  hits = {'top1': top5[:, 0] == labels, 'top5': (top5 == labels[:, None]).any(axis=1)}
  summary: dict[str, Any] = {
    'videos': len(labels),
    'unreadable': int((~readable).sum()),
    'unreadable_videos': dict(
      zip(predictions.ids[~readable].tolist(), predictions.errors[~readable].tolist(), strict=True)
    ),
  }
  for name, hit in hits.items():
    correct = int((hit & readable).sum())
    summary[f'{name}_correct'] = correct
    summary[name] = correct / max(1, int(readable.sum()))
    summary[f'{name}_unreadable_wrong'] = correct / max(1, len(labels))
  return summary


def write_results(
  folder: Path, predictions: Predictions, class_names: tuple[str, ...], about: dict[str, Any]
) -> dict[str, Any]:
  """Writes an evaluation's files into a folder, by one process, results.json last; returns what that holds."""
  results = {**summarise(predictions), **about}
  if not is_first():
    return results
  folder.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    folder / 'probabilities.npz',
    ids=predictions.ids,
    labels=predictions.labels,
    probabilities=predictions.probabilities,
    errors=predictions.errors,
  )
  _write_csv(folder / 'predictions.csv', predictions, class_names)
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
      writer.writerow([video, name, class_names[best], confidence, int(best == label), top5, ''])
