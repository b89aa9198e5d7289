"""Datasets of video files: each file is read and decoded once and becomes an example or an unusable video."""

import dataclasses
import errno
import functools
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets import tasks
from mevit_jax.datasets.builders import VideoBuilder
from mevit_jax.datasets.shards import group_items
from mevit_jax.datasets.tasks import Check, Executor, ProgressCallback, Row, Task
from mevit_jax.errors import UserError, printable
from mevit_jax.video.container import MAX_PIXELS, VideoError, read_regular
from mevit_jax.video.transcode import Encoding, reencode

MAX_BYTES = 256 * 2**20  # default size limit of a video; a serialized example is limited to 2 GiB
MIN_SHARDS = 64  # shards of a dataset at least, unless they would be smaller than SHARD_BYTES[0], for parallel work
SHARD_BYTES = 8 * 2**20, 256 * 2**20

SPLITS = 'train', 'validation', 'test'
KEEP = Encoding('keep')
EXAMINED_PER_TASK = 32  # videos of a task; those of an unfinished task are examined again


@dataclasses.dataclass(frozen=True, slots=True)
class ListedVideo:
  """A video as the lists or folders of a dataset name it.

  Attributes:
    id: id of the video, unique in the dataset and the same on every machine.
    path: path of its file; '' or a path that does not exist if the video is missing.
    label: class name; '' in a split without labels.
    split: train, validation or test; '' if none was given.
  """

  id: str
  path: str
  label: str
  split: str


@dataclasses.dataclass(frozen=True)
class Listing:
  """The videos that a dataset's lists or folders name.

  Attributes:
    videos: all listed videos, including missing ones; either all have a split or none.
    class_names: name of each label id; classes without videos are allowed.
    notes: further remarks, one line each.

  Ids and labels are made printable: they are shown, and are lines of text files.
  """

  videos: Sequence[ListedVideo]
  class_names: tuple[str, ...]
  notes: Sequence[str] = ()

  def __post_init__(self) -> None:
    names = itertools.chain(self.class_names, (video.id for video in self.videos))
    if any(printable(name) != name for name in names):
      videos = [
        dataclasses.replace(video, id=printable(video.id), label=printable(video.label)) for video in self.videos
      ]
      object.__setattr__(self, 'videos', videos)
      object.__setattr__(self, 'class_names', tuple(map(printable, self.class_names)))


@dataclasses.dataclass(frozen=True, slots=True)
class VideoFile:
  """A video file on disk, with all that its example depends on, so that a change is noticed.

  Attributes:
    video: its listing.
    num_bytes: size of the file.
    mtime_ns: time of its last change, in nanoseconds.
    examined: row of an earlier examination; None if there was none.
  """

  video: ListedVideo
  num_bytes: int
  mtime_ns: int
  examined: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a video file; a video that exceeds one is unusable.

  Attributes:
    time_limit: seconds that decoding may take; 0 disables the limit.
    max_bytes: size of the file.
    max_pixels: height x width of a frame.
  """

  time_limit: float = 0
  max_bytes: int = MAX_BYTES
  max_pixels: int = MAX_PIXELS


class FilesBuilder(VideoBuilder):
  """Videos from files."""

  def __init__(
    self,
    data_dir: str | Path,
    name: str,
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[VideoFile]],
    encoding: Encoding,
    limits: Limits = Limits(),
  ):
    total = sum(file.num_bytes for files in splits.values() for file in files)
    smallest, largest = SHARD_BYTES
    limit = min(max(total // MIN_SHARDS, smallest), largest)
    shards = {split: group_items(files, lambda file: file.num_bytes, limit) for split, files in splits.items()}
    self.make = functools.partial(make_example, encoding=encoding, limits=limits)
    self.encoding = encoding_settings(encoding)
    self.unusable_example = unusable_example
    self.time_limit = hard_time_limit(limits.time_limit)
    super().__init__(data_dir, name, class_names, shards)


def group_by_split(files: Sequence[VideoFile]) -> dict[str, list[VideoFile]]:
  """Groups files by their given split, in the listed order; the order of splits is train, validation, test."""
  splits: dict[str, list[VideoFile]] = {name: [] for name in SPLITS}
  for file in files:
    splits[file.video.split].append(file)
  return {name: members for name, members in splits.items() if members}


def find_files(listing: Listing) -> tuple[list[VideoFile], list[ListedVideo]]:
  """Returns the videos whose files exist, and those that are missing; opens no file.

  Raises:
    UserError: two videos have the same id, a label is not one of the classes, or all files are missing.
  """
  paths: dict[str, str] = {}
  files, missing, classes = [], [], {*listing.class_names, ''}
  for video in listing.videos:
    if video.id in paths:
      raise UserError(f'two videos have the id {video.id!r}: {paths[video.id]} and {video.path}')
    if video.label not in classes:
      raise UserError(f'{video.id} has the class {video.label!r}, which is not in the list of classes')
    paths[video.id] = video.path
    size, mtime_ns = _stat(video.path)
    if mtime_ns is None:
      missing.append(video)
    else:
      files.append(VideoFile(video, size, mtime_ns))
  if not files:
    example = next((video.path for video in missing if video.path), '')
    raise UserError(f'all {len(missing)} listed videos are missing{example and f" (for example {example})"}')
  return files, missing


def examine(
  files: Sequence[VideoFile],
  directory: Path,
  executor: Executor,
  progress: ProgressCallback = lambda done, total: None,
  check: Check = lambda unusable, total: None,
  encoding: Encoding = KEEP,
  limits: Limits = Limits(),
) -> dict[str, Row]:
  """Decodes every video and returns its row, by id; results of an interrupted run in `directory` are reused.

  Args:
    files: files in any order.
    directory: directory of intermediate files, which the caller removes.
    executor, progress, check: see `tasks.run`.
    encoding, limits: see `make_example`.
  """
  make = functools.partial(make_example, encoding=encoding, limits=limits)
  settings, hard_limit = encoding_settings(encoding), hard_time_limit(limits.time_limit)
  plan = []
  # Grouped by class: where one class changes, the tasks of the others stay the same.
  ordered = sorted(files, key=lambda file: (file.video.label, file.video.id))
  for _, members in itertools.groupby(ordered, lambda file: file.video.label):
    for part in group_items(list(members), lambda file: 1, EXAMINED_PER_TASK):
      task = Task('', part, make, unusable_example, encoding=settings, time_limit=hard_limit)
      plan.append(dataclasses.replace(task, name=task.digest))
  tasks.run(directory, plan, executor, progress, check)
  return {row['id']: row for task in plan for row in tasks.require_manifest(directory, task)['rows']}


def _stat(path: str) -> tuple[int, int | None]:
  """Returns a file's size and modification time in nanoseconds; the time is None if the file does not exist."""
  try:
    stat = os.stat(path)
  except OSError as error:
    # A file without permission exists: opening it will make it unusable.
    return 0, None if error.errno in (errno.ENOENT, errno.ENOTDIR) else 0
  return stat.st_size, stat.st_mtime_ns


def make_example(file: VideoFile, encoding: Encoding, limits: Limits = Limits()) -> dict[str, Any]:
  """Reads one file and decodes every frame, unless an examination has done so; returns its example or an unusable one.

  Args:
    file: the file.
    encoding: encoding to store it in.
    limits: what the video may take at most.

  Raises:
    UserError: the file has changed since it was listed or examined.
  """
  try:
    data = read_regular(Path(file.video.path), limits.max_bytes)
  except (VideoError, OSError, MemoryError) as error:
    return unusable_example(file, _reason(error))
  digest, examined = hashlib.sha256(data).hexdigest(), file.examined
  if _stat(file.video.path) != (file.num_bytes, file.mtime_ns) or (examined and examined['sha256'] != digest):
    raise UserError(f'{file.video.path} changed during preparation; run the command again to continue')
  try:
    if examined and encoding.kind == 'keep':
      properties, damage = examined, examined['damage']
    else:
      data, source, stored = reencode(data, encoding, limits.time_limit or None, limits.max_pixels)
      properties, damage = dataclasses.asdict(stored), printable(source.damage)
  except Exception as error:  # any kind: one video must not stop the others
    return unusable_example(file, _reason(error))
  return {
    'video': data,
    'label': file.video.label,
    'id': file.video.id,
    'sha256': digest,
    **{field: properties[field] for field in ('num_frames', 'fps', 'duration', 'height', 'width')},
    'damage': damage,
  }


def _reason(error: Exception) -> str:
  text = printable(' '.join((getattr(error, 'strerror', None) or str(error)).split()))
  return text if isinstance(error, (VideoError, OSError)) and text else f'{type(error).__name__} {text}'.strip()


def unusable_example(file: VideoFile, reason: str) -> dict[str, Any]:
  """Returns the example of a video that cannot be used."""
  return {'label': file.video.label, 'id': file.video.id, 'unusable': reason}


def encoding_settings(encoding: Encoding) -> dict[str, Any]:
  """Returns the settings that decide the bytes of re-encoded videos; empty if bytes are kept."""
  return {} if encoding.kind == 'keep' else dataclasses.asdict(encoding)


def hard_time_limit(time_limit: float) -> float:
  """Returns the seconds after which a process is ended whose decoder hangs and so cannot check `time_limit`."""
  return 1.25 * time_limit + 1 if time_limit else 0
