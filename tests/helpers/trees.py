"""Folders of empty files, for tests that only read names."""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path


def make_tree(root: Path, *names: str) -> Path:
  """Creates empty files below `root`, and their folders."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  return root


def write_lines(path: Path, *lines: str) -> Path:
  """Writes lines to a file, and creates its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(lines) + '\n', 'utf-8')
  return path


@contextlib.contextmanager
def shuffled_listing(monkeypatch, seed: int) -> Iterator[None]:
  """Makes folders list their files in another order, as on another machine."""
  scandir = os.scandir

  @contextlib.contextmanager
  def shuffled(path):
    with scandir(path) as entries:
      entries = list(entries)
    random.Random(seed).shuffle(entries)
    yield iter(entries)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'scandir', shuffled)
    yield
