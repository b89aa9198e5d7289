"""Presentation of predictions: timeline of labels, labels drawn on a video, figure."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from mevit_jax.evaluation.metrics import ranked
from mevit_jax.files import atomic_path
from mevit_jax.report.film_strip import film_strip, frame_size
from mevit_jax.report.fonts import matplotlib_fonts, pillow_font

_COLORS = [
  '#0969da', '#bc4c00', '#1a7f37', '#8250df', '#8c959f', '#bf3989', '#1b7c83', '#9a6700', '#cf222e', '#1f2328'
]  # fmt: skip
_OTHER = '#d0d7de'  # of all other classes
_STRIP_HEIGHT, _STRIP_GAP = 120, 4  # pixels


class WindowPrediction(Protocol):
  """Prediction for a video or a window of it, from `start` to `end` in seconds."""

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
  """Time segment with one label and its mean probability."""

  start: float
  end: float
  label: str
  probability: float


def segments(windows: Sequence[WindowPrediction]) -> list[Segment]:
  """Merges consecutive windows with the same label into a timeline.

  Each moment belongs to the window with the nearest center.
  """
  centers = [(window.start + window.end) / 2 for window in windows]
  edges = [windows[0].start, *((a + b) / 2 for a, b in itertools.pairwise(centers)), windows[-1].end]
  best = ranked(np.stack([window.probabilities for window in windows]), 1)[:, 0].tolist()
  changes = [0, *(i for i in range(1, len(best)) if best[i] != best[i - 1]), len(best)]
  return [
    Segment(
      edges[first],
      edges[last],
      windows[first].names[best[first]],
      float(np.mean([window.probabilities[best[first]] for window in windows[first:last]])),
    )
    for first, last in itertools.pairwise(changes)
  ]


def clock(seconds: float, digits: int = 1) -> str:
  """Formats a time as 1:02:03.4 or 2:03.4, with this number of digits after the point."""
  unit = 10**digits
  ticks = round(unit * seconds)
  minutes, hours = ticks // (60 * unit) % 60, ticks // (3600 * unit)
  text = f'{ticks // unit % 60:02d}.{ticks % unit:0{digits}d}'
  return f'{hours}:{minutes:02d}:{text}' if hours else f'{minutes}:{text}'


def clock_digits(times: Sequence[float]) -> int:
  """Returns how many digits after the point tell the times apart and state them exactly, from 1 to 3."""
  return next((digits for digits in (1, 2) if all(abs(time - round(time, digits)) < 5e-4 for time in times)), 3)


def label_drawer(windows: Sequence[WindowPrediction]) -> Callable[[np.ndarray, float], np.ndarray]:
  """Builds a function for `write_overlay` that draws the label at a time onto a frame."""
  timeline = segments(windows)
  ends = [segment.end for segment in timeline]

  def draw(frame: np.ndarray, time: float) -> np.ndarray:
    segment = timeline[min(int(np.searchsorted(ends, time, side='right')), len(timeline) - 1)]
    return _draw_text(frame, f'{segment.label}  {100 * segment.probability:.0f} %')

  return draw


def _draw_text(frame: np.ndarray, text: str) -> np.ndarray:
  """Draws a line of text at the bottom of a frame, shrunk to fit its width."""
  image = Image.fromarray(frame)
  size = max(8, image.height // 18)
  width = pillow_font(text, size)[0].getlength(text)
  font, text = pillow_font(text, max(6, int(size * min(1, 0.94 * image.width / max(1, width)))))
  draw = ImageDraw.Draw(image, 'RGBA')
  margin = size // 2
  left, top, right, bottom = draw.textbbox((margin, image.height - margin), text, font, 'ls')
  draw.rectangle((left - margin // 2, top - margin // 2, right + margin // 2, bottom + margin // 2), (0, 0, 0, 160))
  draw.text((margin, image.height - margin), text, 'white', font, 'ls')
  return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class PredictedVideo:
  """A video in the figure: name, frames uint8 `t h w 3` sampled from all of it, predictions of its windows."""

  name: str
  frames: np.ndarray
  windows: Sequence[WindowPrediction]


@dataclasses.dataclass(frozen=True)
class _Window:
  """Window whose names are spelled for a figure."""

  names: Sequence[str]
  probabilities: np.ndarray
  start: float
  end: float


def draw_figure(path: Path, videos: Sequence[PredictedVideo], top: int = 5) -> None:
  """Draws predictions as `_draw_figure` does, in fonts that have the characters of all names."""
  names = {name for video in videos for name in (video.name, *video.windows[0].names)}
  with matplotlib_fonts(names, text_in_svg=path.suffix.lower() == '.svg') as spell:
    spelled = {name: spell(name) for name in names}
    videos = [
      PredictedVideo(
        spelled[video.name],
        video.frames,
        [_Window([spelled[name] for name in w.names], w.probabilities, w.start, w.end) for w in video.windows],
      )
      for video in videos
    ]
    _draw_figure(path, videos, top)


def _draw_figure(path: Path, videos: Sequence[PredictedVideo], top: int) -> None:
  """Draws each video as a film strip above bars of its `top` classes, or curves over time if it has several windows."""
  import matplotlib.figure  # slow to import

  height = 1.6 * max(1, min(top, len(videos[0].windows[0].names)) / 5)  # inches of the bars or curves
  figure = matplotlib.figure.Figure(figsize=(9.5, (1.1 + height) * len(videos)), dpi=130, layout='constrained')
  ratios = [1, height / 1.1] * len(videos)
  grid = figure.subplots(2 * len(videos), squeeze=False, gridspec_kw={'height_ratios': ratios})[:, 0]
  for video, strip, plot in zip(videos, grid[::2], grid[1::2], strict=True):
    strip.imshow(film_strip(video.frames, frame_size(video.frames, _STRIP_HEIGHT), _STRIP_GAP))
    strip.axis('off')
    strip.set_title(video.name, fontsize=9, loc='left', weight='bold', parse_math=False)
    (_draw_curves if len(video.windows) > 1 else _draw_bars)(plot, video.windows, top)
    plot.spines[['top', 'right']].set_visible(False)
    plot.tick_params(labelsize=8)
  with atomic_path(path) as temporary:
    figure.savefig(temporary, format=path.suffix[1:] or None)


def _draw_bars(axes: Any, windows: Sequence[WindowPrediction], top: int) -> None:
  (window,) = windows
  order = ranked(window.probabilities[None], top)[0]
  axes.barh(range(len(order)), window.probabilities[order], color=_COLORS[0], height=0.7)
  axes.set_yticks(range(len(order)), [window.names[k] for k in order], parse_math=False)
  for row, k in enumerate(order):
    axes.text(window.probabilities[k] + 0.005, row, f'{100 * window.probabilities[k]:.1f} %', va='center', fontsize=8)
  axes.invert_yaxis()
  axes.set(xlim=(0, 1.08), xticks=[])
  axes.spines['bottom'].set_visible(False)


def _draw_curves(axes: Any, windows: Sequence[WindowPrediction], top: int) -> None:
  """Draws the classes with the highest mean probability, at most ten, and the timeline as a band below."""
  probabilities = np.stack([window.probabilities for window in windows])  # windows c
  shown = np.argsort(-probabilities.mean(0), kind='stable')[: min(top, len(_COLORS))]
  colors = dict(zip((windows[0].names[k] for k in shown), _COLORS, strict=False))
  centers = [(window.start + window.end) / 2 for window in windows]
  for k in shown:
    name = windows[0].names[k]
    axes.plot(centers, probabilities[:, k], '.-' if len(windows) < 60 else '-', lw=1.2, color=colors[name], label=name)
  timeline = segments(windows)
  for segment in timeline:
    color = colors.get(segment.label, _OTHER)
    axes.axvspan(segment.start, segment.end, 0, 0.07, color=color, lw=0)
  if any(segment.label not in colors for segment in timeline):
    axes.plot([], [], lw=6, color=_OTHER, label='other classes')
  axes.set(xlim=(windows[0].start, windows[-1].end), ylim=(-0.09, 1.02), yticks=[0, 0.5, 1], ylabel='probability')
  axes.yaxis.label.set_size(8)
  axes.xaxis.set_major_formatter(lambda value, _: clock(value))
  legend = axes.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
  for text in legend.get_texts():
    text.set_parse_math(False)
