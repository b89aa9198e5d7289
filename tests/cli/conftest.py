"""The command in this process, and videos for it."""

import pytest
from absl import flags
from absl.testing import flagsaver

from mevit_jax.cli import prepare
from tests.helpers.commands import video


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs the command in this process; returns what it printed."""
  monkeypatch.setattr(prepare, '_workers', lambda: 0)

  def call(*arguments):
    with flagsaver.flagsaver():
      prepare.main(flags.FLAGS(['prepare', *map(str, arguments)]))
    return capsys.readouterr().out

  return call


@pytest.fixture
def folder(tmp_path):
  """Two classes of five videos each; one is dead, two are the same."""
  root = tmp_path / 'My Videos'
  for i in range(10):
    path = root / ('cats', 'dogs')[i % 2] / f'{i}.mp4'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'not a video' if i == 9 else video(i % 8))
  return root
