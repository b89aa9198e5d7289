"""Converts pretrained weights of another library, or of another workdir, into a workdir for training and evaluation.

  mevit convert vit_base/ --workdir=runs/k400 --config=configs/k400.py
  mevit convert B_16.npz --workdir=runs/k400 --config=configs/k400.py --config.data.data_dir=/data
  mevit convert timesformer/ --workdir=runs/timesformer --config=configs/timesformer.py

  mevit convert hf://facebook/dinov2-base --workdir=runs/k400 --config=configs/k400.py
  mevit convert hf://facebook/timesformer-base-finetuned-k400 --workdir=timesformer      # no dataset

WEIGHTS is an .npz, .safetensors or PyTorch file, a folder of Hugging Face or timm, a workdir, a shared model, or the
name of a model on the Hugging Face Hub, hf://ORG/NAME[@REVISION] or timm/NAME, which is downloaded; its format is
detected from its content (docs/weights.md lists all). A table shows the origin of every parameter, and the tensors that
are not used. --config.init_head=keep keeps a head whose classes have no names in the source. Continue with
`mevit train --config=... --workdir=...` with the same config then trains, and `mevit evaluate` evaluates.

Without --config, or without the config's dataset on this machine, a classifier that names its classes becomes a shared
model with these classes (as `mevit export --to=mevit` writes it), for predict, explain, export and init_from.
"""

import dataclasses
from collections.abc import Sequence

from absl import flags

from mevit_jax.checkpoint.workdir import is_shared
from mevit_jax.config import experiment
from mevit_jax.config import flags as config_flags
from mevit_jax.convert import convert, convert_alone
from mevit_jax.errors import UserError

REQUIRED = ('workdir',)  # flags


def main(argv: Sequence[str]) -> None:
  """Converts the weights that the argument names."""
  if len(argv) != 2:
    raise UserError('give the weights to convert, one file or folder, or a name; see --help')
  options = flags.FLAGS
  if options.config is None:
    folder = convert_alone(argv[1], options.workdir)
  else:
    folder = convert(dataclasses.replace(experiment.from_dict(options.config), init_from=argv[1]), options.workdir)
  if is_shared(folder):
    print(f'wrote {folder}; to predict: mevit predict VIDEO --model={folder}')
  else:
    print(f'wrote {folder}; to train: mevit train --config=... --workdir={folder}')


def define_flags() -> None:
  """Defines the flags of this command."""
  config_flags.define_config_flag()
  flags.DEFINE_string('workdir', None, 'Folder to write; it must be new.')
