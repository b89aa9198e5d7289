"""Example videos of an evaluation with their labels and predictions: selection, and the figure videos.png."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mevit_jax.evaluation.protocol import Predictions
from mevit_jax.files import atomic_path
from mevit_jax.report.film_strip import film_strip, sample_frames

_CORRECT, _WRONG, _NEUTRAL = '#1a7f37', '#cf222e', '#8c959f'
_MAX_FRAMES = 8
_DPI, _GAP = 150, 5  # pixels
_FRAME_WIDTH, _TEXT_WIDTH, _MARGIN, _TOP, _ROW_GAP = 1.1, 3.6, 0.12, 0.5, 0.08  # inches


@dataclasses.dataclass(frozen=True)
class Example:
  """A video with its label and prediction.

  Attributes:
    frames: `t h w 3`, uint8.
    label: class name, or '' without a label.
    top_classes: (name, probability) of the most probable classes, in falling order.
  """

  frames: np.ndarray
  label: str
  top_classes: Sequence[tuple[str, float]]


def choose_examples(predictions: Predictions, count: int = 8) -> list[int]:
  """Chooses videos to show: up to half are the most confident mistakes, the rest are correct and of many classes.

  A video without a label counts as correct.
  """
  predicted = predictions.ranked(1)[:, 0]
  confidence = predictions.probabilities.max(axis=1)
  labels = np.where(predictions.labels < 0, predicted, predictions.labels)
  correct = predicted == labels
  order = np.argsort(-confidence, kind='stable')
  mistakes = [int(i) for i in order if predictions.readable[i] and not correct[i]][: count // 2]
  candidates = np.flatnonzero(correct & predictions.readable)
  first_of_class = {int(labels[i]): int(i) for i in reversed(candidates)}
  others = [int(i) for i in candidates if int(i) not in first_of_class.values()]
  return ([first_of_class[label] for label in sorted(first_of_class)] + others)[: count - len(mistakes)] + mistakes


def choose_worst(predictions: Predictions, count: int = 12) -> list[int]:
  """Chooses the most confident mistakes; without mistakes, the least confident predictions."""
  labeled = predictions.labels >= 0
  mistakes = labeled & (predictions.ranked(1)[:, 0] != predictions.labels) & predictions.readable
  confidence = predictions.probabilities.max(axis=1)
  candidates = mistakes if mistakes.any() else predictions.readable
  order = np.argsort(-confidence if mistakes.any() else confidence, kind='stable')
  return [int(i) for i in order if candidates[i]][:count]


def draw_examples(path: Path, examples: Sequence[Example], title: str) -> None:
  """Writes a PNG with one film strip per video, its label and its most probable classes."""
  import matplotlib.figure  # slow to import

  columns = min(_MAX_FRAMES, max(len(example.frames) for example in examples))
  height, width = examples[0].frames.shape[1:3]
  row_height = _FRAME_WIDTH * height / width
  size = (
    _MARGIN + columns * _FRAME_WIDTH + _TEXT_WIDTH,
    len(examples) * (row_height + _ROW_GAP) + _TOP + _MARGIN,
  )
  figure = matplotlib.figure.Figure(figsize=size, dpi=_DPI, facecolor='white')
  style: dict[str, Any] = {'fontsize': 11, 'weight': 'bold', 'va': 'center', 'parse_math': False}
  figure.text(_MARGIN / size[0], 1 - 0.5 * _TOP / size[1], title, **style)
  for row, example in enumerate(examples):
    bottom = size[1] - _TOP - (row + 1) * (row_height + _ROW_GAP)
    frames = example.frames[sample_frames(len(example.frames), columns)]
    strip = film_strip(frames, (round(_FRAME_WIDTH * _DPI) - _GAP, round(row_height * _DPI)), _GAP)
    box = (_MARGIN / size[0], bottom / size[1], strip.shape[1] / _DPI / size[0], row_height / size[1])
    axes = figure.add_axes(box)
    axes.imshow(strip, aspect='auto', interpolation='nearest')
    axes.axis('off')
    _draw_labels(figure, example, (2 * _MARGIN + columns * _FRAME_WIDTH, bottom + row_height / 2), size)
  with atomic_path(path) as temporary:
    figure.savefig(temporary, format='png', metadata={'Software': None})


def _draw_labels(figure: Any, example: Example, center: tuple[float, float], size: tuple[float, float]) -> None:
  """Draws the label and the most probable classes, with bars for their probabilities, right of a film strip."""
  x, y = center
  (predicted, _), label = example.top_classes[0], example.label
  mark, color = ('✓', _CORRECT) if predicted == label else ('✗', _WRONG)
  if not label:
    mark, label, color = '', 'no label', _NEUTRAL
  style: dict[str, Any] = {'va': 'center', 'parse_math': False}  # a name with two dollar signs is not a formula
  position = x / size[0], (y + 0.27) / size[1]
  figure.text(*position, f'{mark} {label}'.strip(), fontsize=9, color=color, weight='bold', **style)
  for k, (name, probability) in enumerate(example.top_classes[:2]):
    line = (y + 0.02 - 0.24 * k) / size[1]
    bar = figure.add_axes((x / size[0], line - 0.075 / size[1], 0.8 * probability / size[0] + 1e-4, 0.15 / size[1]))
    bar.set_facecolor(_CORRECT if name == example.label else _WRONG if k == 0 and example.label else _NEUTRAL)
    bar.set_xticks([])
    bar.set_yticks([])
    bar.spines[:].set_visible(False)
    text = f'{100 * probability:5.1f} %  {name}'
    figure.text((x + 0.88) / size[0], line, text, fontsize=8, family='monospace', **style)
