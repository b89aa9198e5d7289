"""Atomic writes: a file is complete or absent; checked JSON: every damaged byte is detected."""

import contextlib
import errno
import json
import os

import pytest

from mevit_jax.errors import UserError
from mevit_jax.files import (
  atomic_path,
  new_folder,
  read_checked_json,
  read_json_lines,
  write_checked_json,
  write_text,
)


def test_a_failed_write_keeps_the_old_file_and_no_other(tmp_path):
  write_text(tmp_path / 'a', 'old')
  with contextlib.suppress(KeyError), atomic_path(tmp_path / 'a') as path:
    path.write_text('half')
    raise KeyError
  assert (tmp_path / 'a').read_text() == 'old'
  assert [each.name for each in tmp_path.iterdir()] == ['a']


def test_unwritable_file_is_a_one_line_error(tmp_path):
  with pytest.raises(UserError, match=r'nowhere/a cannot be written: No such file') as raised:
    write_text(tmp_path / 'nowhere' / 'a', 'x')
  assert '\n' not in str(raised.value)


def test_full_disk_is_a_one_line_error(tmp_path, monkeypatch):
  def fill(path, *_, **__):
    path.touch()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(type(tmp_path), 'write_text', fill)
  with pytest.raises(UserError, match=r'a cannot be written: No space left on device$'):
    write_text(tmp_path / 'a', 'x')
  assert not list(tmp_path.iterdir())


def test_a_new_folder_is_complete_or_empty(tmp_path):
  with contextlib.suppress(KeyError), new_folder(tmp_path / 'a') as folder:
    (folder / 'x').write_text('x')
    raise KeyError
  assert not list((tmp_path / 'a').iterdir())
  with new_folder(tmp_path / 'a') as folder:
    (folder / 'x').write_text('x')
  with pytest.raises(UserError, match='is not empty'), new_folder(tmp_path / 'a'):
    pass


def test_every_damaged_byte_of_checked_json_is_detected(tmp_path):
  content = {'step': 12, 'top1': 0.5, 'evaluation': 'validation-1x1'}
  path = tmp_path / 'best.json'
  write_checked_json(path, content)
  assert read_checked_json(path) == content
  intact = path.read_bytes()
  for i in range(len(intact)):
    for flipped in (0x01, 0x80):
      path.write_bytes(intact[:i] + bytes([intact[i] ^ flipped]) + intact[i + 1 :])
      with contextlib.suppress(ValueError):  # otherwise white space was replaced by other white space
        assert read_checked_json(path) == content, (i, flipped)
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match='has no checksum'):
    read_checked_json(path)


def test_damaged_lines_are_skipped_and_counted(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  assert read_json_lines(path) == []
  path.write_bytes(b'{"a": 1}\n{"a": \xff}\n{"a": 2}\n{"a"')
  assert read_json_lines(path) == [{'a': 1}, {'a': 2}]
  assert 'skipped 2 damaged lines' in caplog.text
