"""Trains or evaluates a video classifier.

  python main.py --config=configs/demo.py --workdir=runs/demo
  python main.py --config=configs/k400.py --workdir=runs/k400 --config.data.data_dir=/data --config.model.block_size=2
  python main.py --config=configs/k400.py --workdir=runs/k400 --mode=evaluate --config.evaluation.clips=4

A workdir that has a checkpoint is resumed. SIGTERM and Ctrl-C save and leave, with exit code 143 and 130: the run is
not done, and the same command goes on. Every field of the config is a flag: --config.training.batch_size=32.

Many hosts run this same command, one process each: on a TPU pod, under SLURM's srun and in launch/gke_jobset.yaml as it
is, elsewhere with --coordinator, --processes and --process_id. They share the workdir.
"""

from absl import flags

from mevit_jax import command, evaluate, recipes, train
from mevit_jax.parallel import distributed

CONFIG = recipes.config_flag()
WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints, metrics and results go.')
MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'evaluate', 'dry_run'],
  'train (evaluates at its end), evaluate the newest checkpoint, or dry_run: one batch through everything, written '
  'nowhere.',
)
COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where a run has several processes.')
PROCESSES = flags.DEFINE_integer('processes', None, 'How many processes the run has.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this one is, from 0 on.')


def main(argv):
  """Runs the mode."""
  command.no_arguments(argv)
  modes = {'train': train.train, 'evaluate': evaluate.evaluate, 'dry_run': train.dry_run}
  with distributed.joined(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value):
    modes[MODE.value](recipes.recipe_of(CONFIG.value), str(WORKDIR.value))


if __name__ == '__main__':
  command.run(main, required=['config', 'workdir'])
