"""Config files and command-line flags: the only module that uses ml_collections."""

import dataclasses

import ml_collections
from absl import flags
from ml_collections import config_flags

from mevit_jax.config.experiment import Config, from_dict
from mevit_jax.errors import UserError

# The flag --config counts as the command's own, so that its --help shows it.
flags.disclaim_key_flags()


def default_config() -> ml_collections.ConfigDict:
  """Returns all fields with their defaults for config files to change; unknown names raise there."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def define_config_flag() -> None:
  """Defines --config and the flags of all its fields (--config.training.batch_size=32)."""
  config_flags.DEFINE_config_file('config', None, 'Config file, such as configs/k400.py, or your own.')


def parse_config(config: ml_collections.ConfigDict | dict) -> Config:
  """Validates what a config file's get_config() returned.

  Raises:
    UserError: not a config, an unknown field, or an invalid value.
  """
  if not isinstance(config, dict) and not hasattr(config, 'to_dict'):
    raise UserError(f'get_config() must return the config that default_config() returned, not {config!r}')
  return from_dict(config if isinstance(config, dict) else config.to_dict())
