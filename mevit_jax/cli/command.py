"""What every command shares: absl flags, quiet logs, and one clear line for what a user can cause."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import app, flags, logging

from mevit_jax.errors import UserError


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
  """Parses flags and runs `main(argv)`; a UserError, a full disk or Ctrl-C ends it in one line.

  Args:
    main: takes the arguments that are not flags, the program's name first.
    required: names of flags that must be given.
  """
  for name in required:
    flags.mark_flag_as_required(name)
    flags.register_validator(name, lambda value: value != '', 'must not be empty')  # as $UNSET is in a shell
  # Libraries below us log what they do, step by step; what they warn of is shown.
  logging.set_verbosity(logging.WARNING)
  app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def no_arguments(argv: Sequence[str]) -> None:
  """Raises a UserError if there are arguments that are not flags."""
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}: every option is --name=value, see --help')


def check_output(flag: str, file: str | None, suffixes: Sequence[str], videos: Iterable[Path]) -> None:
  """Raises a UserError if the file that a flag names, which is written once all is computed, cannot be.

  Args:
    flag: its name.
    file: what it was given.
    suffixes: that the file may have; any if there are none.
    videos: that are read: none of them is written over.
  """
  if not file:
    return
  path = Path(file).expanduser()
  if not path.parent.is_dir():
    raise UserError(f'--{flag}={file}: there is no folder {path.parent}')
  if path.is_dir():
    raise UserError(f'--{flag}={file} is a folder: name a file')
  if suffixes and path.suffix.lower() not in suffixes:
    raise UserError(f'--{flag}={file}: the name of that file ends with {" or ".join(suffixes)}')
  if path.exists() and any(video.exists() and video.samefile(path) for video in videos):
    raise UserError(f'--{flag}={file} is one of the videos: take another name')


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """The arguments that are not flags; an error in a config file or its fields is one line, as for any flag."""
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # of whatever kind: a config file is code
    sys.exit(f'error: {_one_line(error)}')


def _one_line(error: Exception) -> str:
  """What is wrong with a flag: ml_collections puts tracebacks and all other fields into its messages."""
  text = str(error).replace('\\n', '\n').replace("\\'", "'")
  meant = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text)
  if meant:
    return f'the config has no field {meant[2]}; the nearest is {meant[1]}'
  missing = re.search(r'Flag (--\w+) must have a value other than None', text)
  if missing:
    return f'{missing[1]}=... is missing: see --help'
  lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
  unknown = re.search(r'Key "(.*?)" does not exist', text)  # in a config file
  if unknown or any(isinstance(each, KeyError) for each in (error, *error.args)):  # a flag: in another
    return f'the config has no field {unknown[1] if unknown else lines[0].strip(chr(34) + chr(39))}'
  if text.endswith("has no attribute 'get_config'"):
    return 'the config file has no function get_config()'
  last = re.sub(r'^[\w.]*(Error|Exception): ', '', lines[-1])
  return last if len(lines) == 1 else f'{lines[0]} {last}'


def _no_buckets(arguments: Sequence[str]) -> None:
  """Raises a UserError for an address in object storage: it would be taken for a folder of that name here."""
  for argument in arguments:
    if re.search(r'(^|=)(gs|s3|hdfs)://', argument):
      raise UserError(f'{argument}: only folders of this machine serve; mount it there: docs/launch/storage.md')


def _guarded(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
  try:
    _no_buckets(sys.argv[1:])
    main(argv)
  except UserError as error:
    sys.exit(f'error: {error}')
  except OSError as error:
    if error.errno is None and not isinstance(error.__cause__, OSError):
      raise
    lines = str(error).strip().splitlines()  # of a config file, as ml_collections puts it
    last = re.sub(r'.*(\[Errno \d+\]|failure to load:) ', '', lines[-1].strip())
    sys.exit(f'error: {error.strerror}: {error.filename}' if error.filename else f'error: {last}')
  except KeyboardInterrupt:
    sys.exit('interrupted')
