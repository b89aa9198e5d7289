"""Writes datasets: shards in parallel, then the metadata that describes them."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets import builders, metadata, reader, tasks
from mevit_jax.datasets.metadata import Rows
from mevit_jax.datasets.reader import IN_PROGRESS
from mevit_jax.datasets.tasks import Check, Executor, ProgressCallback, Task
from mevit_jax.errors import UserError
from mevit_jax.files import lock_folder

# Name of the replaced version while another takes its place: the lowest version, read only if it is the only one.
_REPLACED = '0.0.0'


def write(
  builder: builders.VideoBuilder,
  executor: Executor = tasks.run_local,
  progress: ProgressCallback = lambda done, total: None,
  check: Check = lambda unusable, total: None,
  arguments: Mapping[str, Any] | None = None,
  report: Callable[[Rows], None] = lambda rows: None,
  keep: bool = False,
) -> str:
  """Writes a dataset, or the rest of one if a run was interrupted, and returns its fingerprint.

  Args:
    builder: dataset to write, at its data_path; shards there of another plan are removed.
    executor, progress, check: see `tasks.run`.
    arguments: arguments that decide the dataset's content, saved with the fingerprint.
    report: called when all shards are written, with a function that yields the row of every video, also unusable ones;
      if it raises, the dataset stays incomplete.
    keep: only write shards that are lost or damaged; refuse to remove or change others.

  Raises:
    UserError: the builder's `make`, `check` or `report` raised it, a process died, the disk is full, or `keep` and the
      builder has another plan.
  """
  directory = Path(builder.data_path)
  splits = {split: _make_tasks(builder, split) for split in builder.shards}
  plan = [task for split_tasks in splits.values() for task in split_tasks]
  if keep:
    _require_same_plan(directory, plan)
  (directory / IN_PROGRESS).mkdir(parents=True, exist_ok=True)  # until everything is written
  (directory / 'dataset_info.json').unlink(missing_ok=True)
  names = {name for task in plan for name in (task.name, f'{task.name}.json')}
  for path in (*directory.glob('*.array_record-*'), *(directory / tasks.MANIFESTS).glob('*.json')):
    if path.name not in names:
      path.unlink()
  tasks.run(directory, plan, executor, progress, check)
  manifests = {split: [directory / tasks.MANIFESTS / f'{task.name}.json' for task in splits[split]] for split in splits}
  report(functools.partial(metadata.read_rows, manifests))
  properties = metadata.Properties(builder.class_names, builder.info.description, builder.encoding, arguments or {})
  digest = metadata.write(directory, properties, manifests)
  shutil.rmtree(directory / IN_PROGRESS)
  return digest


@contextlib.contextmanager
def open_for_writing(directory: Path, overwrite: bool = False) -> Iterator[Path]:
  """Locks a dataset against other commands and yields the directory to write it to.

  That is `directory` itself or, to overwrite a complete dataset, a staging directory that replaces it when the body
  succeeds. Killed at any moment, a complete dataset remains readable, and the next call yields the directory that the
  body had written to.
  """
  with _lock(directory.parent):
    _finish_replacement(directory)
    staging, replaced = staging_directory(directory), directory.with_name(_REPLACED)
    removed_by_user = staging.exists() and not directory.exists()  # the old one was deleted to free disk space
    if not removed_by_user and not (overwrite and reader.is_complete(directory)):
      yield directory
      return
    yield staging
    if directory.exists():
      directory.rename(replaced)
    staging.rename(directory)
    shutil.rmtree(staging.parents[1])
    _finish_replacement(directory)


def staging_directory(directory: Path) -> Path:
  """Returns the directory where a new version is written while `directory` stays readable."""
  return directory.parent / '.staging' / directory.parent.name / directory.name


def recover(directory: Path) -> None:
  """Restores a dataset if a command was killed while it was being replaced."""
  if directory.with_name(_REPLACED).exists():
    with _lock(directory.parent):
      _finish_replacement(directory)


def _finish_replacement(directory: Path) -> None:
  """Completes an interrupted replacement: keeps the new dataset if it is in place, else the old one."""
  replaced = directory.with_name(_REPLACED)
  if replaced.exists() and directory.exists():
    shutil.rmtree(replaced)
  elif replaced.exists():
    replaced.rename(directory)


def _lock(folder: Path) -> contextlib.AbstractContextManager[None]:
  """Locks a dataset's folder; raises a UserError if another command holds the lock."""
  return lock_folder(folder, f'another command is preparing {folder}')


def find_damaged(directory: Path) -> list[str]:
  """Returns the names of the shards of a complete dataset that are missing or truncated, or lack a valid manifest."""
  manifests = directory / tasks.MANIFESTS
  names = []
  for name in sorted(_list_shards(directory)):
    try:
      complete = (directory / name).stat().st_size == tasks.load_manifest(manifests / f'{name}.json')['bytes']
    except (OSError, UserError):
      complete = False
    if not complete:
      names.append(name)
  return names


def was_complete(directory: Path) -> bool:
  """Returns True if a dataset is complete, or was before lost shards were being written again."""
  return any((directory / name).exists() for name in (reader.FINGERPRINT, reader.COPY))


def _list_shards(directory: Path) -> set[str]:
  """Returns the names of all shards that have a file or a manifest."""
  manifests = (directory / tasks.MANIFESTS).glob('*.json')
  return {path.name for path in directory.glob('*.array_record-*')} | {path.stem for path in manifests}


def _require_same_plan(directory: Path, plan: Sequence[Task]) -> None:
  """Raises a UserError if tasks would remove shards, or change those whose manifests are undamaged."""
  changed = _list_shards(directory) - {task.name for task in plan}
  for task in plan:
    with contextlib.suppress(UserError):  # a lost or damaged manifest
      if tasks.load_manifest(directory / tasks.MANIFESTS / f'{task.name}.json')['digest'] != task.digest:
        changed.add(task.name)
  if changed:
    raise UserError(
      f'{directory} has lost shards, and its videos have changed since it was prepared, so {len(changed)} of its other'
      ' shards would be removed; restore the videos, or give --overwrite'
    )


def restore_fingerprint(directory: Path) -> None:
  """Restores a damaged fingerprint.json of a complete dataset from its copy.

  Raises:
    UserError: the copy is damaged too, or the dataset has another format.
  """
  if any(reader.damage(directory / name) for name in (reader.FINGERPRINT, reader.COPY)):
    with _lock(directory.parent):
      metadata.restore_fingerprint(directory)
  reader.check_format(directory)


def rebuild_metadata(directory: Path) -> None:
  """Rebuilds damaged metadata of a complete dataset with undamaged shards: see `metadata.rebuild`."""
  if reader.find_damaged(directory, (*reader.TFDS_FILES, reader.VIDEOS)):
    with _lock(directory.parent):
      metadata.rebuild(directory)


def group_items(items: Sequence[Any], size: Callable[[Any], int], limit: int) -> list[list[Any]]:
  """Groups consecutive items so that the sum of `size` is at most `limit`, with at least one item per group."""
  groups: list[list[Any]] = []
  room = 0
  for item in items:
    if not groups or size(item) > room:
      groups.append([])
      room = limit
    groups[-1].append(item)
    room -= size(item)
  return groups


def _make_tasks(builder: builders.VideoBuilder, split: str) -> list[Task]:
  shards = builder.shards[split]
  return [
    Task(
      f'{builder.name}-{split}.array_record-{i:05d}-of-{len(shards):05d}',
      items,
      builder.make,
      builder.unusable_example,
      builder.class_names,
      dict(builder.encoding),
      builder.time_limit,
    )
    for i, items in enumerate(shards)
  ]
