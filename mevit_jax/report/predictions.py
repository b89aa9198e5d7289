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

_COLORS = ['#0969da', '#bc4c00', '#1a7f37', '#8250df', '#8c959f']
_STRIP_HEIGHT, _STRIP_GAP = 120, 4  # pixels
_MAX_CLASSES = 5


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


def clock(seconds: float) -> str:
  """Formats a time as 1:02:03.4 or 2:03.4."""
  tenths = round(10 * seconds)
  minutes, hours = tenths // 600 % 60, tenths // 36_000
  text = f'{tenths // 10 % 60:02d}.{tenths % 10}'
  return f'{hours}:{minutes:02d}:{text}' if hours else f'{minutes}:{text}'


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


def draw_figure(path: Path, videos: Sequence[PredictedVideo]) -> None:
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
    _draw_figure(path, videos)


def _draw_figure(path: Path, videos: Sequence[PredictedVideo]) -> None:
  """Draws each video as a film strip above bars of its top classes, or curves over time if it has several windows."""
  import matplotlib.figure  # slow to import

  figure = matplotlib.figure.Figure(figsize=(9.5, 2.7 * len(videos)), dpi=130, layout='constrained')
  grid = figure.subplots(2 * len(videos), squeeze=False, gridspec_kw={'height_ratios': [1, 1.5] * len(videos)})[:, 0]
  for video, strip, plot in zip(videos, grid[::2], grid[1::2], strict=True):
    strip.imshow(film_strip(video.frames, frame_size(video.frames, _STRIP_HEIGHT), _STRIP_GAP))
    strip.axis('off')
    strip.set_title(video.name, fontsize=9, loc='left', weight='bold', parse_math=False)
    (_draw_curves if len(video.windows) > 1 else _draw_bars)(plot, video.windows)
    plot.spines[['top', 'right']].set_visible(False)
    plot.tick_params(labelsize=8)
  with atomic_path(path) as temporary:
    figure.savefig(temporary, format=path.suffix[1:] or None)


def _draw_bars(axes: Any, windows: Sequence[WindowPrediction]) -> None:
  (window,) = windows
  order = ranked(window.probabilities[None], _MAX_CLASSES)[0]
  axes.barh(range(len(order)), window.probabilities[order], color=_COLORS[0], height=0.7)
  axes.set_yticks(range(len(order)), [window.names[k] for k in order], parse_math=False)
  for row, k in enumerate(order):
    axes.text(window.probabilities[k] + 0.005, row, f'{100 * window.probabilities[k]:.1f} %', va='center', fontsize=8)
  axes.invert_yaxis()
  axes.set(xlim=(0, 1.08), xticks=[])
  axes.spines['bottom'].set_visible(False)


def _draw_curves(axes: Any, windows: Sequence[WindowPrediction]) -> None:
  """Draws the classes with the highest mean probability, and the timeline as a band below."""
  probabilities = np.stack([window.probabilities for window in windows])  # windows c
  top = np.argsort(-probabilities.mean(0), kind='stable')[:_MAX_CLASSES]
  colors = dict(zip((windows[0].names[k] for k in top), _COLORS, strict=False))
  centers = [(window.start + window.end) / 2 for window in windows]
  for k in top:
    name = windows[0].names[k]
    axes.plot(centers, probabilities[:, k], '.-' if len(windows) < 60 else '-', lw=1.2, color=colors[name], label=name)
  for segment in segments(windows):
    color = colors.get(segment.label, '#d0d7de')
    axes.axvspan(segment.start, segment.end, 0, 0.07, color=color, lw=0)
  axes.set(xlim=(windows[0].start, windows[-1].end), ylim=(-0.09, 1.02), yticks=[0, 0.5, 1], ylabel='probability')
  axes.yaxis.label.set_size(8)
  axes.xaxis.set_major_formatter(lambda value, _: clock(value))
  legend = axes.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
  for text in legend.get_texts():
    text.set_parse_math(False)
