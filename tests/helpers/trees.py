"""Trees of empty files: what is found does not depend on what is in them."""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path


def lay(root: Path, *names: str) -> Path:
  """Makes empty files below `root`, and the folders they lie in."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  return root


def write(path: Path, *lines: str) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(lines) + '\n', 'utf-8')
  return path


@contextlib.contextmanager
def other_order(monkeypatch, seed: int) -> Iterator[None]:
  """Folders list their files in another order, as they do on another machine."""
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
