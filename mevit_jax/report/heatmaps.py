"""Heat maps over a clip: on its frames, and as film strips in a picture."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mevit_jax.config.model import MEViTConfig
from mevit_jax.evaluation.attention_maps import Kind, Patch

_SIDE = 112  # pixels: frames are enlarged to this many at least
_FRAMES = 16  # in a strip, at most
_COLOURS = 'inferno'
_COVER = 0.75  # of a frame, by the colour of the largest weight


@dataclasses.dataclass(frozen=True)
class HeatMap:
  """Weights over a clip's patches.

  Attributes:
    title: what they are, a line or two.
    weights: `t rows columns`.
    query: the patch that reads, (frame, row, column), or None.
  """

  title: str
  weights: np.ndarray
  query: Patch | None = None


def heat_maps(
  kinds: Sequence[Kind], maps: Sequence[np.ndarray], patch: np.ndarray, config: MEViTConfig
) -> list[HeatMap]:
  """One clip's maps, `t rows columns` each, with what they are; `patch` is the query, 3."""
  frame, row, column = patch.tolist()
  return [_heat_map(*kind, weights, (frame, row, column), config) for kind, weights in zip(kinds, maps, strict=True)]


def shade(frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Frames `t h w 3` uint8 in grey under the colours of weights `t rows columns` in 0..1; small ones are enlarged."""
  import matplotlib

  colours = matplotlib.colormaps[_COLOURS](weights, bytes=True)[..., :3]  # t rows columns 3
  size = _size(frames)
  shaded = []
  for frame, heat, weight in zip(frames, colours, weights, strict=True):
    grey = np.asarray(_enlarged(frame, size).convert('L'), np.float32)[..., None]
    # Patches stay squares: nothing is known between them.
    heat, weight = (_stretched(x, size) for x in (heat, (255 * weight).astype(np.uint8)))
    share = _COVER * np.sqrt(weight[..., None] / 255)
    shaded.append((0.8 * grey * (1 - share) + heat * share).round().astype(np.uint8))
  return np.stack(shaded)


def scaled(weights: np.ndarray) -> np.ndarray:
  """Weights in 0..1: the largest of the clip is 1."""
  return weights / max(float(weights.max()), 1e-12)


def draw(frames: np.ndarray, maps: Sequence[HeatMap], title: str) -> np.ndarray:
  """A picture, uint8 `h w 3`: a strip of the clip's frames `t h w 3`, and one below it for each heat map."""
  import matplotlib.figure  # takes a while: only where a picture is drawn
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  shown = np.unique(np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int))
  if query := next((heat.query for heat in maps if heat.query), None):
    shown = np.unique([*shown, query[0]])  # its frame is always there
  size = _size(frames)
  strips = [('the clip', np.stack([np.asarray(_enlarged(frame, size)) for frame in frames]), query)]
  strips += [(heat.title, shade(frames, scaled(heat.weights)), heat.query) for heat in maps]
  width = 1.0
  height, left, top = width * size[1] / size[0], 2.3, 0.45
  whole = left + len(shown) * (width + 0.04) + 0.08, top + len(strips) * (height + 0.08) + 0.05
  figure = matplotlib.figure.Figure(figsize=whole, dpi=120, facecolor='white')
  text: dict[str, Any] = {'va': 'center', 'parse_math': False}  # a name with two dollars is no formula
  figure.text(0.1 / whole[0], 1 - 0.5 * top / whole[1], title, fontsize=11, weight='bold', **text)
  for row, (words, pictures, marked) in enumerate(strips):
    bottom = whole[1] - top - (row + 1) * (height + 0.08)
    figure.text(0.1 / whole[0], (bottom + height / 2) / whole[1], words, fontsize=8, **text)
    for column, number in enumerate(shown):
      x = left + column * (width + 0.04)
      axes = figure.add_axes((x / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))
      axes.imshow(pictures[number], aspect='auto', interpolation='nearest')
      axes.axis('off')
      if marked and number == marked[0]:
        _outline(axes, marked, size, maps[0].weights.shape[1:])
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _heat_map(name: str, block: int, weights: np.ndarray, patch: Patch, config: MEViTConfig) -> HeatMap:
  says = {
    'space': f'space attention\nof the patch, block {block}',
    'motion': f'motion attention\nof the patch, block {block}',
    'class': f'class attention, block {block}'
    if config.class_blocks
    else f'class token in space\nattention, block {block}',
    'rollout': f'rollout, blocks 0 to {block}',
  }
  token = 1 - weights.sum()
  rest = f'; class token {100 * token:.1f} %' if token > 5e-4 else ''
  title = f'{says[name]}\nlargest {100 * weights.max():.1f} %{rest}'
  return HeatMap(title, weights, patch if name in ('space', 'motion') else None)


def _outline(axes, patch: Patch, size: tuple[int, int], grid: tuple[int, ...]) -> None:
  import matplotlib.patches

  width, height = size[0] / grid[1], size[1] / grid[0]
  corner = patch[2] * width - 0.5, patch[1] * height - 0.5
  for colour, thick in (('black', 2.6), ('#39ff14', 1.3)):
    axes.add_patch(matplotlib.patches.Rectangle(corner, width, height, fill=False, ec=colour, lw=thick))


def _size(frames: np.ndarray) -> tuple[int, int]:
  """Width and height of a frame when it is shown."""
  height, width = frames.shape[1:3]
  times = -(-_SIDE // min(height, width))
  return width * times, height * times


def _enlarged(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
  return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def _stretched(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  return np.asarray(_enlarged(x, size), np.float32)
