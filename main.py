"""Trains or evaluates a video classifier: `mevit train`, `mevit evaluate` and `mevit dry-run` as one script.

  python main.py --config=configs/demo.py --workdir=runs/demo
  python main.py --mode=evaluate --workdir=runs/k400 --config.evaluation.clips=4

Training resumes from the newest checkpoint in the workdir. SIGTERM and Ctrl-C save a checkpoint and exit with code 143
and 130; the same command then resumes. Every config field is a flag: --config.training.batch_size=32.

Multi-host runs start this same command once per process. TPU pods, SLURM's srun and launch/gke_jobset.yaml need no
further flags; elsewhere give --coordinator, --processes and --process_id. All hosts must share the workdir.
"""

from collections.abc import Sequence

from absl import flags

from mevit_jax.cli import command, dry_run, evaluate, train


def main(argv: Sequence[str]) -> None:
  """Runs the mode."""
  modes = {'train': train, 'evaluate': evaluate, 'dry_run': dry_run}
  modes[flags.FLAGS.mode].main(argv)


if __name__ == '__main__':
  evaluates = command.find_flag('mode') == 'evaluate'
  command.define(evaluate if evaluates else train)
  flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'evaluate', 'dry_run'],
    'train (evaluates at the end), evaluate a checkpoint, or dry_run: one batch through everything.',
  )
  command.run(main, required=evaluate.REQUIRED if evaluates else train.REQUIRED)
