"""Trains, evaluates and uses video classifiers.

  mevit prepare       prepare a dataset from videos
  mevit train         train a model, or resume training
  mevit evaluate      evaluate a checkpoint on a dataset split
  mevit dry-run       run one batch through training and evaluation, without writing anything
  mevit predict       classify videos
  mevit explain       draw attention maps of a video
  mevit compare       compare two evaluations of the same videos
  mevit convert       convert pretrained weights into a workdir
  mevit export        export a model for other programs
  mevit push          upload a shared model to the Hugging Face Hub
  mevit plan          estimate memory and speed on accelerators that this machine does not have

`mevit COMMAND --help` describes a command. Without installing: `python -m mevit_jax COMMAND`.
"""

import difflib
import importlib
import os
import sys

from absl import flags

from mevit_jax.cli import command

_MODULES = {
  'prepare': 'prepare', 'train': 'train', 'evaluate': 'evaluate', 'dry-run': 'dry_run', 'predict': 'predict',
  'explain': 'explain', 'compare': 'compare', 'convert': 'convert', 'export': 'export', 'push': 'push',
  'plan': 'plan',
}  # fmt: skip


def main() -> None:
  """Runs the command that the first argument names: the entry point of `mevit` and `python -m mevit_jax`."""
  try:
    _run()
    sys.stdout.flush()
  except BrokenPipeError:  # the reader ended first, as in `mevit --help | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
    sys.exit(1)


def _run() -> None:
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in ('--help', '-h', '-help', 'help'):
    print(__doc__.strip())
    return
  if name == '--version':
    from mevit_jax import __version__

    print(f'mevit_jax {__version__}')
    return
  name = {'dry_run': 'dry-run'}.get(name, name)
  if name not in _MODULES:
    nearest = difflib.get_close_matches(name, _MODULES, n=1)
    hint = f'; did you mean {nearest[0]}?' if nearest else ''
    sys.exit(f'error: unknown command {name!r}{hint} Commands: {", ".join(_MODULES)} (see mevit --help)')
  module = importlib.import_module(f'mevit_jax.cli.{_MODULES[name]}')
  del sys.argv[1]
  command.define(module)
  if {'--help', '-h', '-help', '-?'} & set(sys.argv[1:]):
    print(f'{(module.__doc__ or "").strip()}\n\nFlags of mevit {name}:')
    print(flags.FLAGS.module_help(module.define_flags.__module__).partition('\n')[2])
    return
  command.run(module.main, required=module.REQUIRED)


if __name__ == '__main__':
  main()
