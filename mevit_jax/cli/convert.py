"""Converts pretrained weights of another library, or of another workdir, into a workdir for training and evaluation.

  mevit convert vit_base/ --workdir=runs/k400 --config=configs/k400.py
  mevit convert B_16.npz --workdir=runs/k400 --config=configs/k400.py --config.data.data_dir=/data
  mevit convert timesformer/ --workdir=runs/timesformer --config=configs/timesformer.py

WEIGHTS is an .npz, .safetensors or PyTorch file, a folder of Hugging Face or timm, a workdir, or a shared model; its
format is detected from its content (docs/weights.md lists all). A table shows the origin of every parameter, and the
tensors that are not used. --config.init_head=keep keeps a head whose classes have no names in the source. Continue with
`mevit train --config=... --workdir=...` with the same config then trains, and `mevit evaluate` evaluates.
"""

import dataclasses
from collections.abc import Sequence

from absl import flags

from mevit_jax.config import experiment
from mevit_jax.config import flags as config_flags
from mevit_jax.convert import convert
from mevit_jax.errors import UserError

REQUIRED = ('config', 'workdir')  # flags


def main(argv: Sequence[str]) -> None:
  """Converts the weights that the argument names."""
  if len(argv) != 2:
    raise UserError('give the weights to convert, one file or folder; see --help')
  config = dataclasses.replace(experiment.from_dict(flags.FLAGS.config), init_from=argv[1])
  folder = convert(config, flags.FLAGS.workdir)
  print(f'wrote {folder}; to train: mevit train --config=... --workdir={folder}')


def define_flags() -> None:
  """Defines the flags of this command."""
  config_flags.define_config_flag()
  flags.DEFINE_string('workdir', None, 'Workdir to write; it must be new.')
