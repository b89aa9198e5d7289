"""Names that are safe to show, and messages of one line."""

import pickle

import pytest

from mevit_jax.errors import UserError, printable


def test_printable_text_is_unchanged():
  for text in ('plain', 'é ñ', '跳舞', 'مرحبا', '👍 "quoted" \\ $x$'):
    assert printable(text) == text


def test_what_could_control_a_terminal_is_escaped():
  assert printable('\x1b[2J\x9b\x07\x7f') == r'\x1b[2J\x9b\x07\x7f'
  assert printable('a\tb\r\nc\u2028d') == r'a\tb\r\nc\u2028d'
  assert printable('\u202egpj.exe\u2066') == r'\u202egpj.exe\u2066'


def test_bytes_that_are_not_utf8_are_escaped():
  assert printable(b'\xcc\xf8.mp4'.decode(errors='surrogateescape')) == r'\xcc\xf8.mp4'
  assert printable('\ud800') == r'\ud800'


def test_printable_text_is_not_escaped_again():
  once = printable('\x1b\udccc\n')
  assert printable(once) == once


def test_the_message_of_a_user_error_is_one_printable_line():
  error = UserError('b\x1b[31m\nad')
  assert str(error) == r'b\x1b[31m\nad'
  assert str(pickle.loads(pickle.dumps(error))) == str(error)
  with pytest.raises(UserError, match=r'^$'):
    raise UserError
