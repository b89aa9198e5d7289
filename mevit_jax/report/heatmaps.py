"""Attention maps as heat maps over the frames of a clip."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mevit_jax.config.model import MEViTConfig
from mevit_jax.evaluation.attention_maps import MapKind, Patch
from mevit_jax.report.film_strip import film_strip, resize_frame, sample_frames

_MIN_SIDE = 112  # pixels: smaller frames are enlarged by an integer factor
_MAX_FRAMES = 16  # in a strip
_COLORMAP = 'inferno'
_MAX_ALPHA = 0.75  # opacity of the color of the largest weight
_DPI = 120
_FRAME_WIDTH, _GAP, _LEFT, _TOP, _MARGIN = 1.0, 0.04, 2.3, 0.45, 0.1  # inches


@dataclasses.dataclass(frozen=True)
class HeatMap:
  """Attention weights over the patches of a clip.

  Attributes:
    title: description in a line or two.
    weights: `t rows columns`.
    query: query patch (frame, row, column), or None.
  """

  title: str
  weights: np.ndarray
  query: Patch | None = None


def heat_maps(
  kinds: Sequence[MapKind], maps: Sequence[np.ndarray], query: np.ndarray, config: MEViTConfig
) -> list[HeatMap]:
  """Adds titles to the attention maps of one clip.

  Args:
    kinds: kinds of the maps.
    maps: weights, `t rows columns` each.
    query: query patch, `3`.
    config: model config.
  """
  frame, row, column = query.tolist()
  return [_heat_map(kind, weights, (frame, row, column), config) for kind, weights in zip(kinds, maps, strict=True)]


def overlay_weights(frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Colors gray frames, uint8 `t h w 3`, by weights in 0..1, `t rows columns`; small frames are enlarged."""
  import matplotlib

  colors = matplotlib.colormaps[_COLORMAP](weights, bytes=True)[..., :3]  # t rows columns 3
  size = _display_size(frames)
  blended = []
  for frame, color, weight in zip(frames, colors, weights, strict=True):
    gray = np.asarray(Image.fromarray(resize_frame(frame, size)).convert('L'), np.float32)[..., None]
    # Weights are constant over a patch, so they are not interpolated.
    color = _stretch(color, size)
    alpha = _MAX_ALPHA * np.sqrt(_stretch((255 * weight).astype(np.uint8), size)[..., None] / 255)
    blended.append((0.8 * gray * (1 - alpha) + color * alpha).round().astype(np.uint8))
  return np.stack(blended)


def scale_to_max(weights: np.ndarray) -> np.ndarray:
  """Divides weights by the largest one in the clip."""
  return weights / max(float(weights.max()), 1e-12)


def draw_heat_maps(frames: np.ndarray, maps: Sequence[HeatMap], title: str) -> np.ndarray:
  """Draws a film strip of a clip `t h w 3` and one for each heat map below it: uint8 `h w 3`."""
  import matplotlib.figure  # slow to import
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  shown = sample_frames(len(frames), _MAX_FRAMES)
  query = next((heat_map.query for heat_map in maps if heat_map.query), None)
  if query:
    shown = np.unique([*shown, query[0]])  # always show the frame of the query
  strips = [('input frames', frames, query)]
  strips += [(x.title, overlay_weights(frames, scale_to_max(x.weights)), x.query) for x in maps]
  size = _display_size(frames)
  row_height = _FRAME_WIDTH * size[1] / size[0]
  width = _LEFT + len(shown) * (_FRAME_WIDTH + _GAP) + _MARGIN
  height = _TOP + len(strips) * (row_height + 2 * _GAP) + _MARGIN
  figure = matplotlib.figure.Figure(figsize=(width, height), dpi=_DPI, facecolor='white')
  style: dict[str, Any] = {'va': 'center', 'parse_math': False}  # a name with two dollar signs is not a formula
  figure.text(_MARGIN / width, 1 - 0.5 * _TOP / height, title, fontsize=11, weight='bold', **style)
  gap = round(_GAP * size[0])
  for row, (text, images, patch) in enumerate(strips):
    bottom = height - _TOP - (row + 1) * (row_height + 2 * _GAP)
    figure.text(_MARGIN / width, (bottom + row_height / 2) / height, text, fontsize=8, **style)
    strip = film_strip(images[shown], size, gap)
    strip_width = strip.shape[1] / size[0] * _FRAME_WIDTH
    axes = figure.add_axes((_LEFT / width, bottom / height, strip_width / width, row_height / height))
    axes.imshow(strip, aspect='auto', interpolation='nearest')
    axes.axis('off')
    if patch:
      left = int(np.flatnonzero(shown == patch[0])[0]) * (size[0] + gap)
      _outline_patch(axes, patch, size, maps[0].weights.shape[1:], left)
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _heat_map(kind: MapKind, weights: np.ndarray, query: Patch, config: MEViTConfig) -> HeatMap:
  name, block = kind
  description = {
    'space': f'space attention\nof the query, block {block}',
    'motion': f'motion attention\nof the query, block {block}',
    'class': f'class attention, block {block}'
    if config.class_blocks
    else f'space attention of the\nclass token, block {block}',
    'rollout': f'rollout, blocks 0 to {block}',
  }[name]
  others = 1 - weights.sum()
  names = 'frame and class tokens' if config.frame_tokens else 'class token'
  suffix = f'; {names} {100 * others:.1f} %' if others > 5e-4 else ''
  title = f'{description}\nmax {100 * weights.max():.1f} %{suffix}'
  return HeatMap(title, weights, query if name in ('space', 'motion') else None)


def _outline_patch(axes: Any, patch: Patch, size: tuple[int, int], grid: tuple[int, ...], left: int) -> None:
  import matplotlib.patches

  width, height = size[0] / grid[1], size[1] / grid[0]
  corner = left + patch[2] * width - 0.5, patch[1] * height - 0.5
  for color, line_width in (('black', 2.6), ('#39ff14', 1.3)):
    axes.add_patch(matplotlib.patches.Rectangle(corner, width, height, fill=False, ec=color, lw=line_width))


def _display_size(frames: np.ndarray) -> tuple[int, int]:
  """Returns the width and height at which frames are shown."""
  height, width = frames.shape[1:3]
  factor = -(-_MIN_SIDE // min(height, width))
  return width * factor, height * factor


def _stretch(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  return np.asarray(Image.fromarray(x).resize(size, Image.Resampling.NEAREST), np.float32)
