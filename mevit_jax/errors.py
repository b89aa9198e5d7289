"""The one exception for what a user can cause, and can mend; and names that are safe to show."""

import re

# Control characters, line separators, bidirectional overrides, and bytes that are not UTF-8 (surrogates in Python).
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
_SHORT = {'\t': r'\t', '\n': r'\n', '\r': r'\r'}


class UserError(ValueError):
  """Bad input: the message is one line that says what, where and what to do."""

  def __init__(self, message: object = ''):
    super().__init__(printable(message))


def printable(text: object) -> str:
  r"""Returns text on one line, for terminals, logs, figures and lists of names.

  Control characters, line breaks, bidirectional overrides and bytes that are not UTF-8 become escapes such as \x1b, so
  that the name of a file or class can neither control a terminal nor look like another line.
  """
  return _UNPRINTABLE.sub(_escape, str(text))


def _escape(match: re.Match[str]) -> str:
  code = ord(match[0])
  if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode turns a byte that is not UTF-8 into this
    code -= 0xDC00
  return _SHORT.get(match[0]) or (f'\\x{code:02x}' if code < 256 else f'\\u{code:04x}')
