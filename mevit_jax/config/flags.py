"""Config files and command-line flags: the only module that uses ml_collections."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from mevit_jax.config.experiment import Config, from_dict, to_dict
from mevit_jax.errors import UserError

# The flag --config counts as the command's own, so that its --help shows it.
flags.disclaim_key_flags()

# The top-level folder configs/, which is a link here and a copy in an installed package.
CONFIGS = Path(__file__).parents[1] / 'configs'


def default_config() -> ml_collections.ConfigDict:
  """Returns all fields with their defaults for config files to change; unknown names raise there."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


class _ConfigParser(flags.ArgumentParser):
  """Parses --config: a file, or the name of a config of this package."""

  def __init__(self, files: flags.ArgumentParser):
    self._files = files

  def parse(self, argument: str) -> Any:
    return self._files.parse(find_config(argument))

  def flag_type(self) -> str:
    return self._files.flag_type()


def define_config_flag() -> None:
  """Defines --config and the flags of all its fields (--config.training.batch_size=32)."""
  description = 'Config file, or the name of a config of this package, such as k400, k400:L/16 or ablations/table1:3.'
  config_flags.DEFINE_config_file('config', None, description)
  flag = flags.FLAGS['config']
  flag.parser = _ConfigParser(flag.parser)


def define_saved_config_flag(values: dict[str, Any]) -> None:
  """Defines the flags of all fields of a saved config, which may change them; --config itself is not needed."""
  config = ml_collections.ConfigDict(to_dict(from_dict(values))).lock()
  config_flags.DEFINE_config_dict('config', config, "The workdir's config.")


def config_names() -> list[str]:
  """Returns the names of the configs of this package: 'demo', 'ablations/table1'."""
  names = (path.relative_to(CONFIGS).with_suffix('').as_posix() for path in CONFIGS.glob('**/*.py'))
  return sorted(name for name in names if name != 'common')


def find_config(value: str) -> str:
  """Returns the file of a config of this package, keeping its argument; returns paths unchanged.

  Args:
    value: value of --config: 'k400', 'k400:L/16', 'configs/k400.py', '/my/config.py:argument'.

  Raises:
    UserError: a name that is neither a file nor a config of this package.
  """
  name, colon, argument = value.partition(':')
  packaged = CONFIGS / f'{name}.py'
  if name.endswith('.py') or Path(name).is_file():
    return value
  if name and packaged.is_file():
    return f'{packaged}{colon}{argument}'
  if Path(name).exists():  # a folder: opening it reports that
    return value
  names = config_names()
  nearest = difflib.get_close_matches(name, names, n=1)
  hint = f'did you mean {nearest[0]}?' if nearest else f'use a .py file or one of {", ".join(names)}'
  raise UserError(f'unknown config {name!r}; {hint}')


def parse_config(config: ml_collections.ConfigDict | dict) -> Config:
  """Validates what a config file's get_config() returned.

  Raises:
    UserError: not a config, an unknown field, or an invalid value.
  """
  if not isinstance(config, dict) and not hasattr(config, 'to_dict'):
    raise UserError(f'get_config() must return the config that default_config() returned, not {config!r}')
  return from_dict(config if isinstance(config, dict) else config.to_dict())
