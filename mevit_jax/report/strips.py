"""Pictures of what a model says: film strips with label, prediction and confidence."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.evaluation.protocol import Predictions

_RIGHT, _WRONG, _NEUTRAL = '#1a7f37', '#cf222e', '#8c959f'
_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class Strip:
  """One video in the picture: frames `t h w 3` uint8, its label, and the likeliest classes with their probabilities.

  The label is '' where the video has none.
  """

  frames: np.ndarray
  label: str
  likeliest: Sequence[tuple[str, float]]


def choose(predictions: Predictions, count: int = 8) -> list[int]:
  """Which videos to show: up to half are the most confident mistakes, the others are right, of many classes.

  A video without a label is taken to be right.
  """
  best = predictions.ranked(1)[:, 0]
  confidence = predictions.probabilities.max(axis=1)
  labels = np.where(predictions.labels < 0, best, predictions.labels)
  right = best == labels
  mistakes = [int(i) for i in np.argsort(-confidence, kind='stable') if predictions.readable[i] and not right[i]]
  first_of = {int(labels[i]): int(i) for i in reversed(np.flatnonzero(right & predictions.readable))}
  others = [int(i) for i in np.flatnonzero(right & predictions.readable) if int(i) not in first_of.values()]
  shown = mistakes[: count // 2]
  return ([first_of[label] for label in sorted(first_of)] + others)[: count - len(shown)] + shown


def film_strips(path: Path, strips: Sequence[Strip], title: str) -> None:
  """Draws videos as rows of up to eight frames, each with its label and the likeliest classes, into a PNG."""
  import matplotlib.figure  # takes a while: only where a picture is drawn

  columns = min(_FRAMES, max(len(strip.frames) for strip in strips))
  height, width = strips[0].frames.shape[1:3]
  frame_width = 1.1
  row_height = frame_width * height / width
  margin, text_width, top = 0.12, 3.6, 0.5
  size = (margin + columns * frame_width + text_width, len(strips) * (row_height + 0.08) + top + margin)
  figure = matplotlib.figure.Figure(figsize=size, dpi=150, facecolor='white')
  figure.text(
    margin / size[0], 1 - 0.5 * top / size[1], title, fontsize=11, weight='bold', va='center', parse_math=False
  )
  for row, strip in enumerate(strips):
    bottom = size[1] - top - (row + 1) * (row_height + 0.08)
    chosen = np.linspace(0, len(strip.frames) - 1, columns).round().astype(int)
    for column, frame in enumerate(strip.frames[chosen]):
      left = margin + column * frame_width
      box = (left / size[0], bottom / size[1], frame_width * 0.97 / size[0], row_height / size[1])
      axes = figure.add_axes(box)
      axes.imshow(frame, aspect='auto', interpolation='nearest')
      axes.axis('off')
    _write_labels(figure, strip, (2 * margin + columns * frame_width, bottom + row_height / 2), size)
  figure.savefig(path, metadata={'Software': None})


def _write_labels(figure, strip: Strip, where: tuple[float, float], size: tuple[float, float]) -> None:
  """The label, and the likeliest classes with their probabilities as bars, right of a strip."""
  x, y = where
  (best, _), label = strip.likeliest[0], strip.label
  mark, colour = ('✓', _RIGHT) if best == label else ('✗', _WRONG)
  if not label:
    mark, label, colour = '', 'no label', _NEUTRAL
  style: dict[str, Any] = {'va': 'center', 'parse_math': False}  # a name with two dollars is no formula
  where_label = x / size[0], (y + 0.27) / size[1]
  figure.text(*where_label, f'{mark} {label}'.strip(), fontsize=9, color=colour, weight='bold', **style)
  for k, (name, probability) in enumerate(strip.likeliest[:2]):
    line = (y + 0.02 - 0.24 * k) / size[1]
    bar = figure.add_axes((x / size[0], line - 0.075 / size[1], 0.8 * probability / size[0] + 1e-4, 0.15 / size[1]))
    bar.set_facecolor(_RIGHT if name == strip.label else _WRONG if k == 0 and strip.label else _NEUTRAL)
    bar.set_xticks([])
    bar.set_yticks([])
    bar.spines[:].set_visible(False)
    text = f'{100 * probability:5.1f} %  {name}'
    figure.text((x + 0.88) / size[0], line, text, fontsize=8, family='monospace', **style)
