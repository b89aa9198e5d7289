"""Names in scripts that Matplotlib's own font lacks, with and without an installed font for them."""

import base64
import logging
import re
import string

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from mevit_jax.report import figures, fonts, heatmaps
from mevit_jax.report.predictions import PredictedVideo, draw_figure, label_drawer
from tests.report.test_predictions import RUNS, WALKS, Part

DANCE, SING = '跳舞', '唱歌'


def make_font(path, text):
  """Writes a font that draws each character of a text as a square."""
  names = ['.notdef', *(f'uni{ord(c):04X}' for c in text)]
  builder = FontBuilder(1000)
  builder.setupGlyphOrder(names)
  builder.setupCharacterMap({ord(c): f'uni{ord(c):04X}' for c in text})
  pen = TTGlyphPen(None)
  pen.moveTo((100, 0))
  for point in ((900, 0), (900, 800), (100, 800)):
    pen.lineTo(point)
  pen.closePath()
  builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
  builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
  builder.setupHorizontalHeader(ascent=800, descent=-200)
  builder.setupNameTable({'familyName': 'Squares', 'styleName': 'Regular', 'psName': 'Squares'})
  builder.setupOS2()
  builder.setupPost()
  builder.save(path)


@pytest.fixture(params=[True, False], ids=['with a font', 'without a font'])
def installed(request, tmp_path, monkeypatch):
  """True if a font that has the characters of the tests is installed, and the only one."""
  path = tmp_path / 'squares.ttf'
  if request.param:
    make_font(path, DANCE + SING + string.printable[:95])
  (tmp_path / 'broken.ttf').write_bytes(b'not a font')
  found = [str(path) for path in (tmp_path / 'broken.ttf', path) if path.exists()]
  monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: found)
  known = list(font_manager.fontManager.ttflist)
  fonts.find_fonts.cache_clear()
  fonts._warn.cache_clear()
  yield request.param
  fonts.find_fonts.cache_clear()
  font_manager.fontManager.ttflist[:] = known


def test_report_draws_names_or_leaves_them_to_the_browser(installed, caplog):
  uri = figures.confusion_matrix_with_counts(np.array([[3, 1], [0, 4]]), [DANCE, SING])
  svg = re.sub('<!--.*?-->', '', base64.b64decode(uri.split(',')[1]).decode())
  assert (DANCE in svg) == (not installed)
  assert ('Squares' in svg) == installed  # ids of outlines have the font's name
  assert 'LastResort' not in svg
  assert not caplog.records


def test_figures_of_pixels_draw_names_or_their_escapes(installed, tmp_path, caplog):
  frames = np.zeros((2, 16, 16, 3), np.uint8)
  windows = [Part(0, 2, np.asarray(WALKS), (DANCE, SING, 'runs')), Part(2, 4, np.asarray(RUNS), (DANCE, SING, 'runs'))]
  for videos in ([PredictedVideo(f'{DANCE}.mp4', frames, windows[:1])], [PredictedVideo('a\x1b', frames, windows)]):
    draw_figure(tmp_path / 'figure.png', videos)
    draw_figure(tmp_path / 'figure.pdf', videos)
    draw_figure(tmp_path / 'figure.svg', videos)
  weights = np.full((2, 2, 2), 0.25)
  image = heatmaps.draw_heat_maps(frames, [heatmaps.HeatMap('rollout', weights)], f'{DANCE} 70 %')
  other = heatmaps.draw_heat_maps(frames, [heatmaps.HeatMap('rollout', weights)], f'{SING} 70 %')
  assert (image != other).any() == (not installed)  # squares are all the same, escapes are not
  with fonts.matplotlib_fonts([DANCE], text_in_svg=False) as spell:
    assert spell(f'{DANCE}\n') == (f'{DANCE}\\n' if installed else r'\u8df3\u821e\n')
  warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
  assert len(warnings) == (0 if installed else len(set(warnings)))
  assert installed or 'fonts-noto-cjk' in warnings[0]


def test_overlays_draw_names_or_their_escapes(installed):
  frame = np.full((90, 160, 3), 128, np.uint8)
  first, second = (label_drawer([Part(0, 2, np.asarray(WALKS), (name, 'b', 'c'))])(frame, 0) for name in (DANCE, SING))
  assert (first != frame).any()
  assert (first != second).any() == (not installed)
  _, text = fonts.pillow_font(f'{DANCE}\x1b', 12)
  assert text == (f'{DANCE}\\x1b' if installed else r'\u8df3\u821e\x1b')
  assert label_drawer([Part(0, 2, np.asarray(WALKS))])(frame[:, :1], 0).shape == (90, 1, 3)


def test_names_are_cut_to_a_width():
  assert fonts.shorten('a' * 24, 24) == 'a' * 24
  assert fonts.shorten('a' * 25, 24) == 'a' * 23 + '…'
  assert fonts.shorten('跳' * 12, 24) == '跳' * 12
  assert fonts.shorten('跳' * 13, 24) == '跳' * 11 + '…'
  assert fonts.shorten('', 24) == ''


def test_names_in_latin_search_no_fonts(monkeypatch):
  monkeypatch.setattr(
    fonts, 'find_fonts', lambda characters: ((), characters) if not characters else pytest.fail('searches')
  )
  with fonts.matplotlib_fonts(['walks', 'größer', 'Бег'], text_in_svg=True) as spell:
    assert spell('größer') == 'größer'
