"""Output of commands: control characters in names do not reach the terminal, progress bars do."""

import io
import logging
import sys

import pytest

from mevit_jax import progress
from mevit_jax.cli import command


class Terminal(io.StringIO):
  """A stream that claims to be a terminal."""

  def isatty(self):
    return True


@pytest.fixture(autouse=True)
def _logger():
  """Restores the package's logger, which commands configure."""
  logger = logging.getLogger('mevit_jax')
  before = logger.handlers, logger.propagate, logger.level
  yield
  logger.handlers, logger.propagate = before[:2]
  logger.setLevel(before[2])


def use_terminals(monkeypatch):
  """Replaces the standard streams by terminals; in the test itself, because pytest replaces them before it."""
  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(sys, name, Terminal())
  return sys.stdout, sys.stderr


def test_control_characters_are_escaped_in_all_that_is_printed(monkeypatch):
  streams = use_terminals(monkeypatch)
  with command._escaped_output():
    print('a\x1b[2Jb\udcff.mp4', 'c\n\td\u202e')
    print('\x07', file=sys.stderr, flush=True)
  assert streams[0].getvalue() == 'a\\x1b[2Jb\\xff.mp4 c\n\td\\u202e\n'
  assert streams[1].getvalue() == '\\x07\n'
  assert (sys.stdout, sys.stderr) == streams


def test_log_messages_are_escaped(monkeypatch):
  streams = use_terminals(monkeypatch)
  with command._escaped_output():
    command.log_to_stdout()
    logging.getLogger('mevit_jax.test').warning('%s is unreadable', 'x\x1b]0;title\x07')
  assert streams[0].getvalue() == 'x\\x1b]0;title\\x07 is unreadable\n'


def test_progress_bars_are_drawn(monkeypatch):
  streams = use_terminals(monkeypatch)
  with command._escaped_output():
    bar = progress.Progress('videos')
    bar(1, 2)
    bar(2, 2)
  assert '\r' in streams[0].getvalue()
  assert '100%' in streams[0].getvalue()
  assert '\\' not in streams[0].getvalue()


def test_errors_are_escaped(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['mevit'])

  def main(argv):
    raise FileNotFoundError(2, 'No such file', 'x\x1b[2J')

  with pytest.raises(SystemExit, match=r'error: No such file: x\\x1b\[2J'):
    command._run(main, ['mevit'])
