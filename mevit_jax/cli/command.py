"""Shared by all commands: flag parsing, log output, one-line errors."""

import contextlib
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import app, flags
from absl import logging as absl_logging

from mevit_jax.errors import UserError, printable


def find_flag(name: str) -> str | None:
  """Returns the value of a flag of this process before flags are parsed; None if it is not given."""
  for argument, following in itertools.pairwise([*sys.argv[1:], '']):
    flag, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and flag == name:
      return value if equals else following
  return None


def define(module: Any) -> None:
  """Defines the flags of a command; a UserError, as of a workdir that cannot be read, exits with one line."""
  try:
    module.define_flags()
  except UserError as error:
    sys.exit(f'error: {error}')


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
  """Parses flags and runs `main(argv)`; a UserError, a full disk or Ctrl-C exits with one line.

  Args:
    main: receives the program's name and the arguments that are not flags.
    required: names of required flags.
  """
  for name in required:
    flags.mark_flag_as_required(name)
    flags.register_validator(name, lambda value: value != '', 'must not be empty')  # an unset shell variable
  app.run(lambda argv: _run(main, argv), flags_parser=_parse)


class _EscapedStream:
  """Text stream that escapes control characters, which names from other people's files may contain."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes text; line breaks, tabs and the carriage returns of progress bars stay."""
    return self._stream.write(re.sub(r'[^\n\r\t]+', lambda part: printable(part[0]), text))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


class _StdoutHandler(logging.StreamHandler):
  """Writes to the current `sys.stdout`, which commands redirect and other processes silence."""

  @property
  def stream(self) -> TextIO:
    """The current standard output, or standard error in processes whose output is silenced."""
    return sys.stderr if getattr(sys.stdout, 'name', '') == os.devnull else sys.stdout

  @stream.setter
  def stream(self, stream: TextIO) -> None:
    """Ignores the stream that was current when the handler was made."""

  def emit(self, record: logging.LogRecord) -> None:
    """Prints a message; silenced processes print warnings only."""
    if self.stream is sys.stdout or record.levelno >= logging.WARNING:
      super().emit(record)


def define_model_flag(description: str) -> None:
  """Defines --model, and --workdir as another name of it."""
  flags.DEFINE_string('model', None, f'{description}: a workdir, shared model or folder, or hf://ORG/NAME[@REVISION].')
  flags.DEFINE_alias('workdir', 'model')


def log_to_stdout() -> None:
  """Prints the package's log messages without prefixes, and only warnings of other libraries."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  logger, handler = logging.getLogger('mevit_jax'), _StdoutHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  logger.handlers, logger.propagate = [handler], False
  logger.setLevel(logging.INFO)


def no_arguments(argv: Sequence[str]) -> None:
  """Raises a UserError if there are arguments that are not flags."""
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}: options are written --name=value, see --help')


def check_output(flag: str, file: str | None, suffixes: Sequence[str], videos: Iterable[Path]) -> None:
  """Checks an output path before long work starts.

  Args:
    flag: name of the flag.
    file: value of the flag; None or '' writes nothing.
    suffixes: allowed file name suffixes; empty allows all.
    videos: input videos, which must not be overwritten.

  Raises:
    UserError: the file cannot be written there.
  """
  if not file:
    return
  path = Path(file).expanduser()
  if not path.parent.is_dir():
    raise UserError(f'--{flag}={file}: the folder {path.parent} does not exist')
  if path.is_dir():
    raise UserError(f'--{flag}={file} is a folder: name a file')
  if suffixes and path.suffix.lower() not in suffixes:
    raise UserError(f'--{flag}={file}: the file name must end with {" or ".join(suffixes)}')
  if path.exists() and any(video.exists() and video.samefile(path) for video in videos):
    raise UserError(f'--{flag}={file} is one of the input videos: choose another name')


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """Returns the arguments that are not flags; errors in a config file or its fields become one line."""
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # a config file is code and may raise anything
    sys.exit(f'error: {_one_line(error)}')


def _one_line(error: Exception) -> str:
  """Summarizes a flag error; ml_collections puts tracebacks and all other fields into its messages."""
  text = str(error).replace('\\n', '\n').replace("\\'", "'")
  suggestion = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text)
  if suggestion:
    return f'the config has no field {suggestion[2]}; the nearest is {suggestion[1]}'
  missing = re.search(r'Flag (--\w+) must have a value other than None', text)
  if missing:
    return f'{missing[1]}=... is missing: see --help'
  lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
  unknown = re.search(r'Key "(.*?)" does not exist', text)  # in a config file
  if unknown or any(isinstance(cause, KeyError) for cause in (error, *error.args)):  # in a flag
    return f'the config has no field {unknown[1] if unknown else lines[0].strip(chr(34) + chr(39))}'
  if text.endswith("has no attribute 'get_config'"):
    return 'the config file has no function get_config()'
  if 'get_config() takes 0 positional arguments' in text:
    return 'the config takes no argument: give --config without the part from the colon on'
  last = re.sub(r'^[\w.]*(Error|Exception): ', '', lines[-1])
  last = re.sub(r'invalid literal for int\(\) with base 10: (.*)', r'\1 is not an integer', last)
  last = re.sub(r'could not convert string to float: (.*)', r'\1 is not a number', last)
  return last if len(lines) == 1 else f'{lines[0]} {last}'


def _refuse_buckets(arguments: Sequence[str]) -> None:
  """Raises a UserError for object storage URLs, which would be taken for local folders of that name."""
  for argument in arguments:
    if re.search(r'(^|=)(gs|s3|hdfs)://', argument):
      raise UserError(f'{argument}: object storage is not supported; mount the bucket: docs/launch/storage.md')


@contextlib.contextmanager
def _escaped_output() -> Iterator[None]:
  """Escapes control characters in all that is printed meanwhile."""
  stdout: Any = _EscapedStream(sys.stdout)
  stderr: Any = _EscapedStream(sys.stderr)
  with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    yield


def _run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
  log_to_stdout()
  try:
    _refuse_buckets(sys.argv[1:])
    with _escaped_output():
      main(argv)
  except UserError as error:
    sys.exit(f'error: {error}')
  except BrokenPipeError:
    raise
  except OSError as error:
    if error.errno is None and not isinstance(error.__cause__, OSError):
      raise
    lines = str(error).strip().splitlines()  # ml_collections wraps the error of a config file
    last = re.sub(r'.*(\[Errno \d+\]|failure to load:) ', '', lines[-1].strip())
    sys.exit(f'error: {printable(f"{error.strerror}: {error.filename}" if error.filename else last)}')
  except KeyboardInterrupt:
    sys.exit('interrupted')
