"""What predictions look like: a timeline in words, labels on a video, a figure."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mevit_jax.evaluation.metrics import ranked

_COLOURS = ['#0969da', '#bc4c00', '#1a7f37', '#8250df', '#8c959f']
_STRIP_HEIGHT = 120  # pixels
_LINES = 5  # classes in a figure


class Part(Protocol):
  """What is said of a video, or of a window of it, from `start` to `end` in seconds."""

  @property
  def names(self) -> Sequence[str]: ...

  @property
  def probabilities(self) -> np.ndarray: ...

  @property
  def start(self) -> float: ...

  @property
  def end(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Segment:
  """A stretch of time with one label, and the mean of its probability there."""

  start: float
  end: float
  label: str
  probability: float


def segments(parts: Sequence[Part]) -> list[Segment]:
  """Windows in order -> the timeline: those next to each other with one label are one.

  A window has the time that is nearer to its middle than to another one's.
  """
  middles = [(part.start + part.end) / 2 for part in parts]
  edges = [parts[0].start, *((a + b) / 2 for a, b in itertools.pairwise(middles)), parts[-1].end]
  best = ranked(np.stack([part.probabilities for part in parts]), 1)[:, 0].tolist()
  changes = [0, *(i for i in range(1, len(best)) if best[i] != best[i - 1]), len(best)]
  return [
    Segment(
      edges[first],
      edges[last],
      parts[first].names[best[first]],
      float(np.mean([part.probabilities[best[first]] for part in parts[first:last]])),
    )
    for first, last in itertools.pairwise(changes)
  ]


def clock(seconds: float) -> str:
  """1:02:03.4, or 2:03.4"""
  tenths = round(10 * seconds)
  minutes, hours = tenths // 600 % 60, tenths // 36_000
  text = f'{tenths // 10 % 60:02d}.{tenths % 10}'
  return f'{hours}:{minutes:02d}:{text}' if hours else f'{minutes}:{text}'


def draws_labels(parts: Sequence[Part]) -> Callable[[np.ndarray, float], np.ndarray]:
  """A function for `overlay.write_overlay`: it writes the label of the moment onto a frame."""
  timeline = segments(parts)
  ends = [segment.end for segment in timeline]

  def draw(frame: np.ndarray, time: float) -> np.ndarray:
    segment = timeline[min(int(np.searchsorted(ends, time, side='right')), len(timeline) - 1)]
    return _written(frame, f'{segment.label}  {100 * segment.probability:.0f} %')

  return draw


def _written(frame: np.ndarray, text: str) -> np.ndarray:
  """The frame with a line of text at the bottom, as large as fits."""
  image = Image.fromarray(frame)
  size = max(8, image.height // 18)
  wide = ImageFont.load_default(size).getlength(text)
  font = ImageFont.load_default(max(6, int(size * min(1, 0.94 * image.width / max(1, wide)))))
  draw = ImageDraw.Draw(image, 'RGBA')
  margin = size // 2
  left, top, right, bottom = draw.textbbox((margin, image.height - margin), text, font, 'ls')
  draw.rectangle((left - margin // 2, top - margin // 2, right + margin // 2, bottom + margin // 2), (0, 0, 0, 160))
  draw.text((margin, image.height - margin), text, 'white', font, 'ls')
  return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A video in the figure: its name, frames uint8 `t h w 3` from all of it, and what is said of it."""

  name: str
  frames: np.ndarray
  parts: Sequence[Part]


def draw_figure(path: Path, videos: Sequence[Shown]) -> None:
  """Draws each video as a film strip, with bars of the likeliest classes or, of several windows, lines over time."""
  import matplotlib.figure  # takes a while: only where a picture is drawn

  figure = matplotlib.figure.Figure(figsize=(9.5, 2.7 * len(videos)), dpi=130, layout='constrained')
  grid = figure.subplots(2 * len(videos), squeeze=False, gridspec_kw={'height_ratios': [1, 1.5] * len(videos)})[:, 0]
  for video, strip, below in zip(videos, grid[::2], grid[1::2], strict=True):
    strip.imshow(_strip(video.frames))
    strip.axis('off')
    strip.set_title(video.name, fontsize=9, loc='left', weight='bold', parse_math=False)
    (_draw_lines if len(video.parts) > 1 else _draw_bars)(below, video.parts)
    below.spines[['top', 'right']].set_visible(False)
    below.tick_params(labelsize=8)
  figure.savefig(path)


def _strip(frames: np.ndarray) -> np.ndarray:
  """Frames next to each other, `h w 3`."""
  height, width = frames.shape[1:3]
  size = max(1, round(width * _STRIP_HEIGHT / height)), _STRIP_HEIGHT
  images = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in frames]
  gap = np.full((_STRIP_HEIGHT, 4, 3), 255, np.uint8)
  return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


def _draw_bars(axes: Any, parts: Sequence[Part]) -> None:
  (part,) = parts
  order = ranked(part.probabilities[None], _LINES)[0]
  axes.barh(range(len(order)), part.probabilities[order], color=_COLOURS[0], height=0.7)
  axes.set_yticks(range(len(order)), [part.names[k] for k in order], parse_math=False)
  for row, k in enumerate(order):
    axes.text(part.probabilities[k] + 0.005, row, f'{100 * part.probabilities[k]:.1f} %', va='center', fontsize=8)
  axes.invert_yaxis()
  axes.set(xlim=(0, 1.08), xticks=[])
  axes.spines['bottom'].set_visible(False)


def _draw_lines(axes: Any, parts: Sequence[Part]) -> None:
  """The classes that have the most of the time, and the timeline as a band below."""
  probabilities = np.stack([part.probabilities for part in parts])  # windows c
  most = np.argsort(-probabilities.mean(0), kind='stable')[:_LINES]
  colour_of = dict(zip((parts[0].names[k] for k in most), _COLOURS, strict=False))
  middles = [(part.start + part.end) / 2 for part in parts]
  for k in most:
    name = parts[0].names[k]
    axes.plot(middles, probabilities[:, k], '.-' if len(parts) < 60 else '-', lw=1.2, color=colour_of[name], label=name)
  for segment in segments(parts):
    colour = colour_of.get(segment.label, '#d0d7de')
    axes.axvspan(segment.start, segment.end, 0, 0.07, color=colour, lw=0)
  axes.set(xlim=(parts[0].start, parts[-1].end), ylim=(-0.09, 1.02), yticks=[0, 0.5, 1])
  axes.xaxis.set_major_formatter(lambda value, _: clock(value))
  legend = axes.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
  for text in legend.get_texts():
    text.set_parse_math(False)
