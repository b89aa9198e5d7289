"""Tasks on Apache Beam: on all cores of a machine, or on a cluster. Needs requirements-beam.txt.

What crosses Beam is the name of a task's file and nothing else: tasks, shards and receipts lie in
the dataset's directory, which all machines must see under the same name, as they must the videos.
"""

import pickle
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from mevit_jax.datasets import tasks
from mevit_jax.datasets.reader import UNFINISHED
from mevit_jax.errors import UserError


def run(directory: Path, todo: Sequence[tasks.Task], options: Sequence[str]) -> tasks.Ticks:
  """Does tasks on Beam: an `Engine`, with Beam's own options: ['--runner=DirectRunner', ...].

  Raises:
    UserError: Beam is not installed, it does not know an option, or what a task raises.
  """
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(f'Apache Beam is not installed ({error}): pip install -r requirements-beam.txt') from error
  paths = []
  for task in todo:
    paths.append(directory / UNFINISHED / f'{task.name}.task')
    paths[-1].write_bytes(pickle.dumps(task))
  problem: list[BaseException] = []

  def work() -> None:
    try:
      with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # A shuffle of names: else Beam may make one bundle of them all, and give it to one worker.
        names = pipeline | apache_beam.Create([str(path.resolve()) for path in paths]) | apache_beam.Reshuffle()
        names | apache_beam.Map(_do)
    except (Exception, SystemExit) as error:  # argparse exits
      problem.append(error)

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  try:
    while thread.is_alive():
      thread.join(timeout=1)
      yield
  finally:
    if thread.is_alive():
      tasks.stop(directory)  # Beam's local runner cannot be told
      thread.join()
  if problem:
    raise UserError(_reason(problem[0])) from problem[0]


def _do(path: str) -> None:
  """A task in a process below Beam's own, which a decoder that crashes cannot take along."""
  task = pickle.loads(Path(path).read_bytes())
  for _ in tasks.supervise(Path(path).parents[1], [task], workers=1):
    pass


def _reason(error: BaseException) -> str:
  """One line of what a worker, or Beam itself, says in many."""
  ours = re.search(r'UserError: (.*?)(?: \[while running .*)?$', str(error), re.MULTILINE)
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return ours[1] if ours else f'Apache Beam: {lines[-1]}'
