"""Uploads a shared model with its model card to the Hugging Face Hub.

  mevit export --model=runs/mine --to=mevit --folder=shared
  mevit push shared hf://ME/NAME --private

The folder is one that `mevit export --to=mevit` wrote; it is verified first. Before, read and complete README.md, the
model card (the license). `hf auth login` or HF_TOKEN gives the token, which needs write access. Afterwards hf://ME/NAME
is accepted wherever the folder is: `mevit predict clip.mp4 --model=hf://ME/NAME`.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import is_shared
from mevit_jax.errors import UserError
from mevit_jax.pretrained.hub import push

REQUIRED: tuple[str, ...] = ()  # flags


def main(argv: Sequence[str]) -> None:
  """Uploads the folder that the first argument names."""
  if len(argv) != 3 or not argv[2].startswith('hf://'):
    raise UserError('give the folder of a shared model, and its name hf://ME/NAME; see --help')
  folder = Path(argv[1]).expanduser()
  if not is_shared(folder):
    raise UserError(f'{folder} is not a shared model: write one with mevit export --to=mevit')
  load_checkpoint(folder)  # verifies it
  print(f'uploaded {push(folder, argv[2], private=flags.FLAGS.private)}')


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_bool('private', False, 'Make a new repository private.')
