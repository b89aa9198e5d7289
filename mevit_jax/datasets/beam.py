"""Runs tasks on Apache Beam, on the cores of one machine or on a cluster. Needs the extra beam.

Only file names pass through Beam. Tasks, shards and manifests are files in the dataset's directory, which all machines
must see under the same path, as they must the videos.
"""

import pickle
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from mevit_jax.datasets import tasks
from mevit_jax.datasets.reader import IN_PROGRESS
from mevit_jax.errors import UserError


def run(directory: Path, pending: Sequence[tasks.Task], options: Sequence[str]) -> tasks.Heartbeats:
  """Runs tasks on Beam; with its options bound, an `Executor`.

  Args:
    directory: directory of the tasks' files.
    pending: tasks to run.
    options: Beam's own options: ['--runner=DirectRunner', ...].

  Raises:
    UserError: Beam is not installed or rejects an option, or a task raises.
  """
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(f'Apache Beam is not installed ({error}): pip install apache-beam') from error
  paths = []
  for task in pending:
    paths.append(directory / IN_PROGRESS / f'{task.name}.task')
    paths[-1].write_bytes(pickle.dumps(task))
  errors: list[BaseException] = []

  def run_pipeline() -> None:
    try:
      with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # Without the reshuffle Beam may fuse all names into one bundle for one worker.
        names = pipeline | apache_beam.Create([str(path.resolve()) for path in paths]) | apache_beam.Reshuffle()
        names | apache_beam.Map(_run_task_file)
    except (Exception, SystemExit) as error:  # argparse exits
      errors.append(error)

  thread = threading.Thread(target=run_pipeline, daemon=True)
  thread.start()
  try:
    while thread.is_alive():
      thread.join(timeout=1)
      yield
  finally:
    if thread.is_alive():
      tasks.request_stop(directory)  # Beam's local runner cannot be canceled
      thread.join()
  if errors:
    raise UserError(_summarize(errors[0])) from errors[0]


def _run_task_file(path: str) -> None:
  """Runs one pickled task in a child process, so that a crashing decoder does not end Beam's worker."""
  task = pickle.loads(Path(path).read_bytes())
  for _ in tasks.run_local(Path(path).parents[1], [task], workers=1):
    pass


def _summarize(error: BaseException) -> str:
  """Returns one line for Beam's error message of many lines."""
  user_error = re.search(r'UserError: (.*?)(?: \[while running .*)?$', str(error), re.MULTILINE)
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return user_error[1] if user_error else f'Apache Beam: {lines[-1]}'
