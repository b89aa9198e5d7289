"""Trains or evaluates a video classifier.

  python main.py --config=configs/demo.py --workdir=runs/demo
  python main.py --config=configs/k400.py --workdir=runs/k400 --config.data.data_dir=/data --config.model.block_size=2
  python main.py --config=configs/k400.py --workdir=runs/k400 --mode=evaluate --config.evaluation.clips=4

A workdir that has a checkpoint is resumed. SIGTERM and Ctrl-C save and leave, with exit code 143 and 130: the run is
not done, and the same command goes on. Every field of the config is a flag: --config.training.batch_size=32.
"""

from absl import flags

from mevit_jax import command, evaluate, recipes, train

CONFIG = recipes.config_flag()
WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints, metrics and results go.')
MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'evaluate', 'dry_run'],
  'train (evaluates at its end), evaluate the newest checkpoint, or dry_run: one batch through everything, written '
  'nowhere.',
)


def main(argv):
  """Runs the mode."""
  command.no_arguments(argv)
  modes = {'train': train.train, 'evaluate': evaluate.evaluate, 'dry_run': train.dry_run}
  modes[MODE.value](recipes.recipe_of(CONFIG.value), str(WORKDIR.value))


if __name__ == '__main__':
  command.run(main, required=['config', 'workdir'])
