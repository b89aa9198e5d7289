"""Fixtures that run `mevit prepare` in this process, and videos for it."""

import logging

import pytest
from absl import flags
from absl.testing import flagsaver

from mevit_jax.cli import prepare
from mevit_jax.datasets import catalog
from tests.helpers.commands import make_noise_video


@pytest.fixture
def run(monkeypatch, capsys, caplog):
  """Returns a function that runs the command in this process and returns what it printed and logged."""
  monkeypatch.setattr(catalog, 'default_workers', lambda: 0)
  caplog.set_level(logging.INFO, 'mevit_jax')
  existing = set(flags.FLAGS)
  prepare.define_flags()

  def call(*arguments):
    caplog.clear()
    with flagsaver.flagsaver():
      prepare.main(flags.FLAGS(['prepare', *map(str, arguments)]))
    return capsys.readouterr().out + '\n'.join(caplog.messages)

  yield call
  for name in set(flags.FLAGS) - existing:
    delattr(flags.FLAGS, name)


@pytest.fixture
def folder(tmp_path):
  """Folder with two classes of five videos each; one video is unusable, two are equal."""
  root = tmp_path / 'My Videos'
  for i in range(10):
    path = root / ('cats', 'dogs')[i % 2] / f'{i}.mp4'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'not a video' if i == 9 else make_noise_video(i % 8))
  return root
