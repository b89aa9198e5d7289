"""Fonts for names in any script: installed fonts draw what Matplotlib's own font lacks."""

import bisect
import contextlib
import functools
import itertools
import logging
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import ImageFont

from mevit_jax.errors import printable

_LOG = logging.getLogger(__name__)
_PREFERRED = re.compile('cjk|sourcehan|notosans|wqy|droidsansfallback', re.IGNORECASE)
_LAST = re.compile('bold|italic|oblique|black|light|thin|mono|serif', re.IGNORECASE)  # styles


@contextlib.contextmanager
def matplotlib_fonts(names: Iterable[str], *, text_in_svg: bool) -> Iterator[Callable[[str], str]]:
  """Sets Matplotlib's fonts for figures with these names that are made and saved meanwhile.

  Yields the function that spells names for the figures. Characters that no installed font has are escapes such as
  \\u8df3, with one warning in the log. In an SVG they stay, and the figure has text in place of outlines, for which
  browsers have more fonts.

  Args:
    names: names of classes and videos.
    text_in_svg: True if the figure is saved as an SVG.
  """
  import matplotlib
  from matplotlib import font_manager

  paths, missing = find_fonts(_unusual(names))
  for path in paths:
    font_manager.fontManager.addfont(path)
  style: dict[Any, Any] = {'font.family': [*matplotlib.rcParams['font.family'], *map(_family, paths)]}
  if missing and text_in_svg:
    style['svg.fonttype'] = 'none'
    missing = frozenset()
  _warn(missing)
  logger = logging.getLogger('matplotlib.font_manager')  # warns where a font has no bold variant
  level = logger.level
  with matplotlib.rc_context(style), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing from')  # one for every character
    logger.setLevel(logging.ERROR)
    try:
      yield functools.partial(_spell, missing=missing)
    finally:
      logger.setLevel(level)


def pillow_font(text: str, size: float) -> tuple[Any, str]:
  """Returns a Pillow font for a line of text, and the text, with escapes for characters that the font lacks."""
  text = printable(text)
  if text.isascii():
    return ImageFont.load_default(size), text
  paths = [_own_font(), *find_fonts(_unusual([text]))[0]]
  path = min(paths, key=lambda path: len(set(text) - _characters(path)))
  missing = frozenset(text) - _characters(path)
  _warn(missing)
  return ImageFont.truetype(path, size), _spell(text, missing)


@functools.lru_cache
def find_fonts(characters: frozenset[str]) -> tuple[tuple[Path, ...], frozenset[str]]:
  """Returns installed fonts that together have the characters, and the characters that none has."""
  from matplotlib import font_manager

  chosen, remaining = [], characters
  if remaining:
    for path in sorted(map(Path, font_manager.findSystemFonts()), key=_preference):
      found = remaining & _characters(path)
      if found:
        chosen.append(path)
        remaining -= found
      if not remaining:
        break
  return tuple(chosen), remaining


@functools.lru_cache
def _warn(missing: frozenset[str]) -> None:
  """Logs, once, characters that figures show as escapes."""
  if missing:
    few = ' '.join(sorted(missing)[:5])
    _LOG.warning('no installed font has %s: shown as escapes; install a font, such as fonts-noto-cjk', few)


def shorten(name: str, columns: int) -> str:
  """Cuts a name to a width, in which Chinese, Japanese and Korean characters take two columns."""
  ends = list(itertools.accumulate(1 + (unicodedata.east_asian_width(c) in 'WF') for c in name))
  if not ends or ends[-1] <= columns:
    return name
  return name[: bisect.bisect_right(ends, columns - 1)] + '…'


def _preference(path: Path) -> tuple[bool, bool, str]:
  return not _PREFERRED.search(path.name), bool(_LAST.search(path.stem)), str(path)


def _unusual(names: Iterable[str]) -> frozenset[str]:
  """Returns the characters of names that Matplotlib's own font lacks."""
  return frozenset(printable(''.join(names))) - _characters(_own_font())


def _spell(name: str, missing: frozenset[str]) -> str:
  escaped = (c.encode('unicode_escape').decode() if c in missing else c for c in printable(name))
  return ''.join(escaped)


@functools.lru_cache
def _characters(path: Path) -> frozenset[str]:
  """Returns the characters that a font file has; none if it cannot be read."""
  from matplotlib.ft2font import FT2Font

  try:
    return frozenset(map(chr, FT2Font(str(path)).get_charmap()))
  except (OSError, RuntimeError):  # not a font, or of an unknown format
    return frozenset()


def _family(path: Path) -> str:
  from matplotlib.ft2font import FT2Font

  return FT2Font(str(path)).family_name


def _own_font() -> Path:
  import matplotlib

  return Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / 'DejaVuSans.ttf'
