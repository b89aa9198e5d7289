"""Timelines and figures of predictions."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from mevit_jax.report.predictions import (
  PredictedVideo,
  Segment,
  clock,
  clock_digits,
  draw_figure,
  label_drawer,
  segments,
)


@dataclasses.dataclass(frozen=True)
class Part:
  start: float
  end: float
  probabilities: np.ndarray
  names: tuple[str, ...] = ('walks', 'runs', '$a$ \\frac')


def parts(*windows):
  return [Part(start, end, np.asarray(p)) for start, end, p in windows]


WALKS, RUNS = (0.7, 0.2, 0.1), (0.1, 0.9, 0)


def test_adjacent_windows_of_one_class_are_merged():
  found = segments(parts((0, 2, WALKS), (2, 4, (0.5, 0.4, 0.1)), (4, 6, RUNS), (6, 8, WALKS)))
  assert found == [
    Segment(0, 4, 'walks', pytest.approx(0.6)),
    Segment(4, 6, 'runs', 0.9),
    Segment(6, 8, 'walks', 0.7),
  ]


def test_times_of_overlapping_windows_belong_to_the_nearest_one():
  assert segments(parts((0, 4, WALKS), (1, 5, RUNS), (6, 10, WALKS))) == [
    Segment(0, 2.5, 'walks', 0.7),
    Segment(2.5, 5.5, 'runs', 0.9),
    Segment(5.5, 10, 'walks', 0.7),
  ]


def test_one_window():
  assert segments(parts((0, 3, RUNS))) == [Segment(0, 3, 'runs', 0.9)]


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0, '0:00.0'), (59.96, '1:00.0'), (754.32, '12:34.3'), (3600, '1:00:00.0'), (7384.5, '2:03:04.5')],
)
def test_times_are_formatted(seconds, text):
  assert clock(seconds) == text


@pytest.mark.parametrize(
  ('times', 'texts'),
  [
    ((0.0, 0.4, 61.2), ['0:00.0', '0:00.4', '1:01.2']),
    ((0.0, 0.25, 0.5), ['0:00.00', '0:00.25', '0:00.50']),
    ((0.125, 3599.9996), ['0:00.125', '1:00:00.000']),
  ],
)
def test_times_have_as_many_digits_as_they_need(times, texts):
  assert [clock(time, clock_digits(times)) for time in times] == texts


def test_overlay_shows_labels_at_the_bottom_that_change_with_time():
  draw = label_drawer(parts((0, 2, WALKS), (2, 4, RUNS)))
  frame = np.full((90, 160, 3), 128, np.uint8)
  early, late, last = (draw(frame, time) for time in (0.0, 2.0, 99.0))
  assert (early[:60] == 128).all()
  assert early.max() > 200  # the letters
  assert early.min() < 80  # their background
  assert (early != late).any()
  np.testing.assert_array_equal(late, last)
  assert draw(frame[:8, :8], 0.0).shape == (8, 8, 3)


def test_figure_contains_frames_and_labels(tmp_path):
  frames = np.random.default_rng(0).integers(0, 256, (8, 12, 16, 3), np.uint8)
  one, several = parts((0, 3, RUNS)), parts((0, 2, WALKS), (2, 4, RUNS))
  sizes = []
  for videos in (
    [PredictedVideo('a $b$', frames, one)],
    [PredictedVideo('a', frames, one), PredictedVideo('b', frames, several)],
  ):
    draw_figure(tmp_path / 'figure.png', videos)
    with Image.open(tmp_path / 'figure.png') as image:
      sizes.append(image.size)
      assert len(image.convert('RGB').getcolors(1 << 20)) > 500  # contains the frames
  assert sizes[1][1] == 2 * sizes[0][1]


@pytest.mark.parametrize(('suffix', 'start'), [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_figures_of_every_kind(tmp_path, suffix, start):
  draw_figure(
    tmp_path / f'figure.{suffix}', [PredictedVideo('a', np.zeros((2, 12, 16, 3), np.uint8), parts((0, 3, RUNS)))]
  )
  assert (tmp_path / f'figure.{suffix}').read_bytes().startswith(start)


def svg_text(path, videos, top):
  """The texts of an SVG figure, which matplotlib writes as comments beside their outlines."""
  draw_figure(path, videos, top)
  return re.findall(r'<!-- (.*?) -->', path.read_text())


@pytest.mark.parametrize(('top', 'shown'), [(1, 1), (3, 3), (7, 7), (20, 12)])
def test_a_figure_has_as_many_classes_as_asked_for(tmp_path, top, shown):
  names = tuple(f'class{i:02d}' for i in range(12))
  one = [Part(0, 3, np.arange(12) / 66, names)]
  found = svg_text(tmp_path / 'figure.svg', [PredictedVideo('a', np.zeros((2, 12, 16, 3), np.uint8), one)], top)
  assert [text for text in found if text.startswith('class')] == list(names[::-1][:shown])


@pytest.mark.parametrize('top', [1, 3])
def test_the_legend_of_a_timeline_names_the_color_of_other_classes(tmp_path, top):
  several = parts((0, 2, WALKS), (2, 4, RUNS), (4, 6, WALKS), (6, 8, WALKS), (8, 10, RUNS))
  found = svg_text(tmp_path / 'f.svg', [PredictedVideo('a', np.zeros((2, 12, 16, 3), np.uint8), several)], top)
  assert found.count('other classes') == (top == 1)  # runs, twice in the timeline, is not among the top one
