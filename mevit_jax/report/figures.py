"""Figures of the HTML report, each encoded as a data URI."""

import base64
import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mevit_jax.evaluation.metrics import BINS, Calibration
from mevit_jax.report.film_strip import film_strip, frame_size, sample_frames
from mevit_jax.report.fonts import matplotlib_fonts, shorten

INK, MUTED, BLUE, ORANGE = '#1f2328', '#8c959f', '#0969da', '#bc4c00'
_COLORS = [BLUE, ORANGE, INK, '#8250df', '#1a7f37', MUTED]
_STYLE: dict[Any, Any] = {
  'font.size': 9,
  'axes.edgecolor': MUTED,
  'axes.labelcolor': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#eaeef2',
  'text.color': INK,
  'text.parse_math': False,  # a name with two dollar signs is not a formula
  'xtick.color': INK,
  'ytick.color': INK,
  'legend.frameon': False,
  'svg.hashsalt': 'mevit_jax',  # reproducible bytes
}
_STRIP_FRAMES, _STRIP_HEIGHT = 8, 112  # pixels
_COLORMAP = 'Blues'


def learning_curve(
  series: Mapping[str, Mapping[int, float]], ylabel: str, references: Mapping[str, float] | None = None
) -> str:
  """Draws one line per series of values by step; series of fewer than 40 values have markers.

  Args:
    series: values by step, by name.
    ylabel: label of the axis.
    references: constants to compare with, by name, drawn as dashed lines.
  """
  with _figure(4.6, 2.9) as (figure, axes):
    for (name, points), color in zip(series.items(), itertools.cycle(_COLORS)):
      steps = sorted(points)
      (line,) = axes.plot(steps, [points[step] for step in steps], label=name, color=color, lw=1.2)
      line.set(marker='o' if len(steps) < 40 else '', markersize=3)
    for (name, value), style in zip((references or {}).items(), itertools.cycle(['--', ':', '-.'])):
      axes.axhline(value, label=name, color=MUTED, lw=1, ls=style)
    axes.set(xlabel='step', ylabel=ylabel)
    axes.set_ylim(bottom=0)
    if len(series) + len(references or {}) > 1:
      axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, columnspacing=1)
    return _svg(figure)


def reliability_diagram(calibration: Calibration) -> str:
  """Draws accuracy by confidence, above a histogram of the confidences."""
  centers, width = (np.arange(BINS) + 0.5) / BINS, 0.94 / BINS
  occupied = calibration.counts > 0
  with _figure(4.6, 4.2, rows=2, height_ratios=(3, 1)) as (figure, axes, histogram):
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls='--', label='perfect calibration')
    axes.bar(centers, calibration.accuracy, width, color=BLUE, label='accuracy')
    means = calibration.confidence[occupied], calibration.accuracy[occupied]
    axes.plot(*means, 'o', ms=3, color=ORANGE, label='mean confidence')
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel='accuracy')
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, columnspacing=1)
    histogram.bar(centers, calibration.counts, width, color=MUTED)
    histogram.set(xlabel='confidence', ylabel='videos')
    return _svg(figure)


def confusion_matrix_with_counts(confusion: np.ndarray, names: Sequence[str]) -> str:
  """Draws a confusion matrix `c c` with class names and counts, for up to about twenty classes."""
  side, fractions = 1.6 + 0.42 * len(names), _row_fractions(confusion)
  with matplotlib_fonts(names, text_in_svg=True) as spell, _figure(side + 0.8, side) as (figure, axes):
    short = [shorten(spell(name), 24) for name in names]
    axes.imshow(fractions, cmap=_COLORMAP, vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
      color = 'white' if fractions[row, column] > 0.6 else INK
      axes.text(column, row, str(confusion[row, column]), ha='center', va='center', fontsize=8, color=color)
    axes.set_xticks(range(len(names)), short, rotation=60, ha='right', rotation_mode='anchor')
    axes.set_yticks(range(len(names)), short)
    axes.set(xlabel='predicted', ylabel='label')
    axes.grid(visible=False)
    return _svg(figure)


def confusion_matrix_pixels(confusion: np.ndarray) -> str:
  """Encodes a confusion matrix `c c` as a PNG with one pixel per cell, which the report scales and labels."""
  import matplotlib

  pixels = matplotlib.colormaps[_COLORMAP](_row_fractions(confusion) ** 0.5, bytes=True)[
    ..., :3
  ]  # the root makes 1 of 50 visible
  return _uri(Image.fromarray(pixels), 'PNG', optimize=True)


def film_strip_jpeg(frames: np.ndarray) -> str:
  """Encodes a film strip of up to eight frames of a video `t h w 3` as a JPEG."""
  sampled = frames[sample_frames(len(frames), _STRIP_FRAMES)]
  return _uri(Image.fromarray(film_strip(sampled, frame_size(frames, _STRIP_HEIGHT))), 'JPEG', quality=82)


def image_png(image: np.ndarray) -> str:
  """Encodes an image, uint8 `h w 3`, as a PNG."""
  return _uri(Image.fromarray(image), 'PNG', optimize=True)


def _row_fractions(confusion: np.ndarray) -> np.ndarray:
  """Divides each row by its sum; rows without videos stay 0."""
  return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


@contextlib.contextmanager
def _figure(width: float, height: float, rows: int = 1, height_ratios: Sequence[float] = (1,)) -> Iterator[tuple]:
  """Yields a figure (sizes in inches) and its axes from top to bottom, in the style of the report."""
  import matplotlib.figure  # slow to import

  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots(rows, squeeze=False, sharex=True, gridspec_kw={'height_ratios': height_ratios})
    yield figure, *axes[:, 0]


def _svg(figure: Any) -> str:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='svg', metadata={'Date': None})
  return _encode(buffer, 'svg+xml')


def _uri(image: Image.Image, image_format: str, **options: Any) -> str:
  buffer = io.BytesIO()
  image.save(buffer, image_format, **options)
  return _encode(buffer, image_format.lower())


def _encode(buffer: io.BytesIO, subtype: str) -> str:
  return f'data:image/{subtype};base64,{base64.b64encode(buffer.getvalue()).decode()}'
