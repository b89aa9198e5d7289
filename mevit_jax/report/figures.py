"""Pictures of a report, each as a data URI that a page holds in itself."""

import base64
import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mevit_jax.evaluation.metrics import BINS, Calibration

INK, MUTED, BLUE, ORANGE = '#1f2328', '#8c959f', '#0969da', '#bc4c00'
_COLOURS = [BLUE, ORANGE, INK, '#8250df', '#1a7f37', MUTED]
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
  'text.parse_math': False,  # a name with two dollars is no formula
  'xtick.color': INK,
  'ytick.color': INK,
  'legend.frameon': False,
  'svg.hashsalt': 'mevit_jax',  # the same picture is the same bytes
}
_STRIP_FRAMES, _STRIP_HEIGHT = 8, 112  # pixels
_SHADES = 'Blues'


def curves(series: Mapping[str, Mapping[int, float]], ylabel: str) -> str:
  """Lines over steps: by name, the values at steps; short ones have marks."""
  with _figure(4.6, 2.9) as (figure, axes):
    for (name, points), colour in zip(series.items(), itertools.cycle(_COLOURS)):
      steps = sorted(points)
      (line,) = axes.plot(steps, [points[step] for step in steps], label=name, color=colour, lw=1.2)
      line.set(marker='o' if len(steps) < 40 else '', markersize=3)
    axes.set(xlabel='step', ylabel=ylabel)
    axes.set_ylim(bottom=0)
    if len(series) > 1:
      axes.legend()
    return _svg(figure)


def reliability(calibration: Calibration) -> str:
  """Accuracy over confidence, and how many predictions are this sure."""
  middles, width = (np.arange(BINS) + 0.5) / BINS, 0.94 / BINS
  filled = calibration.counts > 0
  with _figure(4.6, 4.2, rows=2, height_ratios=(3, 1)) as (figure, axes, below):
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls='--', label='as right as sure')
    axes.bar(middles, calibration.accuracy, width, color=BLUE, label='accuracy')
    means = calibration.confidence[filled], calibration.accuracy[filled]
    axes.plot(*means, 'o', ms=3, color=ORANGE, label='at the mean confidence')
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel='accuracy')
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, columnspacing=1)
    below.bar(middles, calibration.counts, width, color=MUTED)
    below.set(xlabel='confidence', ylabel='videos')
    return _svg(figure)


def few_classes(confusion: np.ndarray, names: Sequence[str]) -> str:
  """A confusion matrix `c c` with names and counts in it: for up to about twenty classes."""
  side, shares = 1.6 + 0.42 * len(names), _shares(confusion)
  short = [name if len(name) <= 24 else f'{name[:23]}…' for name in names]
  with _figure(side + 0.8, side) as (figure, axes):
    axes.imshow(shares, cmap=_SHADES, vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
      colour = 'white' if shares[row, column] > 0.6 else INK
      axes.text(column, row, str(confusion[row, column]), ha='center', va='center', fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), short, rotation=60, ha='right', rotation_mode='anchor')
    axes.set_yticks(range(len(names)), short)
    axes.set(xlabel='predicted', ylabel='label')
    axes.grid(visible=False)
    return _svg(figure)


def many_classes(confusion: np.ndarray) -> str:
  """A confusion matrix `c c` as a PNG of a pixel a cell: the page makes it larger, and knows the names."""
  import matplotlib

  shades = matplotlib.colormaps[_SHADES](_shares(confusion) ** 0.5, bytes=True)[..., :3]  # one video of fifty is seen
  return _uri(Image.fromarray(shades), 'PNG', optimize=True)


def film_strip(frames: np.ndarray) -> str:
  """Up to eight frames of a video `t h w 3` next to each other, as a JPEG."""
  chosen = np.linspace(0, len(frames) - 1, min(_STRIP_FRAMES, len(frames))).round().astype(int)
  images = [_scaled(Image.fromarray(frame)) for frame in frames[chosen]]
  gap = 3
  strip = Image.new('RGB', (sum(image.width + gap for image in images) - gap, images[0].height), 'white')
  for i, image in enumerate(images):
    strip.paste(image, (i * (image.width + gap), 0))
  return _uri(strip, 'JPEG', quality=82)


def picture(image: np.ndarray) -> str:
  """Any picture, uint8 `h w 3`, as a PNG."""
  return _uri(Image.fromarray(image), 'PNG', optimize=True)


def _scaled(image: Image.Image) -> Image.Image:
  """A frame as high as the strip; small ones are enlarged with their pixels visible."""
  enlarges = image.height < _STRIP_HEIGHT
  size = round(image.width * _STRIP_HEIGHT / image.height), _STRIP_HEIGHT
  return image.resize(size, Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS)


def _shares(confusion: np.ndarray) -> np.ndarray:
  """Of each label's videos; a label without videos has none."""
  return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


@contextlib.contextmanager
def _figure(width: float, height: float, rows: int = 1, height_ratios: Sequence[float] = (1,)) -> Iterator[tuple]:
  """A figure of so many inches, and its axes from top to bottom; what is drawn meanwhile has this page's style."""
  import matplotlib.figure  # takes a while: only where a picture is drawn

  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots(rows, squeeze=False, sharex=True, gridspec_kw={'height_ratios': height_ratios})
    yield figure, *axes[:, 0]


def _svg(figure) -> str:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='svg', metadata={'Date': None})
  return _encoded(buffer, 'svg+xml')


def _uri(image: Image.Image, kind: str, **options) -> str:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return _encoded(buffer, kind.lower())


def _encoded(buffer: io.BytesIO, kind: str) -> str:
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
