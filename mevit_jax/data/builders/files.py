"""Videos that lie in files: each opened and decoded once before it goes into a dataset."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from mevit_jax.data import video
from mevit_jax.data.builders import VideoBuilder
from mevit_jax.data.shards import Progress, group, in_processes
from mevit_jax.errors import UserError

MAX_BYTES = 256 * 2**20  # of a video; an example's encoding ends at 2 GiB
SHARD_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
  """A video as a dataset's lists or folders name it.

  Attributes:
    id: names the video in its dataset, the same on every machine; of its own in the whole dataset.
    path: its file; '' or one that is not there: it is counted as missing.
    label: a class name; '' where the split has no labels.
    split: train, validation or test; '' where none was given.
  """

  id: str
  path: str
  label: str
  split: str


@dataclasses.dataclass(frozen=True)
class Listing:
  """What a dataset's own lists, or its folders, say there is.

  Attributes:
    found: every video listed, whether its file is there or not; either all have a split or none.
    class_names: label i is the i-th name; it may hold classes that no video here has.
    notes: what else there is to say of it, a line each.
  """

  found: Sequence[Found]
  class_names: tuple[str, ...]
  notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Examined:
  """What a file holds; `damage` says what of it does not decode, `dead` why none of it serves."""

  bytes: int = 0
  sha256: str = ''
  num_frames: int = 0
  fps: float = 0.0
  duration: float = 0.0
  height: int = 0
  width: int = 0
  damage: str = ''
  dead: str = ''


@dataclasses.dataclass(frozen=True)
class Item:
  """All that an example depends on."""

  found: Found
  examined: Examined


class FilesBuilder(VideoBuilder):
  """Videos from files."""

  def __init__(
    self,
    data_dir: str | Path,
    name: str,
    class_names: Sequence[str],
    items: Mapping[str, Sequence[Item]],
  ):
    shards = {split: group(rows, lambda item: item.examined.bytes, SHARD_BYTES) for split, rows in items.items()}
    super().__init__(data_dir, name, class_names, shards)

  @staticmethod
  def make(item: Item) -> dict[str, Any]:
    """Reads one video's file; UserError if it is not what was examined."""
    data = Path(item.found.path).read_bytes()
    if hashlib.sha256(data).hexdigest() != item.examined.sha256:
      raise UserError(f'{item.found.path} changed while it was prepared: prepare again')
    fields = ('num_frames', 'fps', 'duration', 'height', 'width')
    info = {field: getattr(item.examined, field) for field in fields}
    return {'video': data, 'label': item.found.label, 'id': item.found.id, **info}


def examine(path: str) -> Examined:
  """Reads and decodes one file, every frame."""
  size, digest = 0, ''
  try:
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
      return Examined(size, dead=f'{size / 2**20:.0f} MiB, more than 256: cut it into clips')
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    info = video.inspect(data)
  except FileNotFoundError:
    return Examined(dead='missing: there is no such file')
  except (video.VideoError, OSError, MemoryError) as error:
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return Examined(size, digest, dead=' '.join(reason.split()))
  return Examined(
    bytes=size,
    sha256=digest,
    num_frames=info.num_frames,
    fps=info.fps,
    duration=info.duration,
    height=info.height,
    width=info.width,
    damage=info.damage,
  )


def examine_all(paths: Sequence[str], memory: Path, workers: int, progress: Progress) -> dict[str, Examined]:
  """Examines files in processes; what a killed run examined is read back from `memory`.

  Args:
    paths: the files.
    memory: a file of JSON lines, one for each file examined.
    workers: how many processes; 0 means this one.
    progress: called with how many are examined, and of how many.
  """
  results = _remembered(memory, paths)
  progress(len(results), len(paths))
  memory.parent.mkdir(parents=True, exist_ok=True)
  with memory.open('a') as log:

    def keep(path: str, result: Examined) -> None:
      results[path] = result
      line = [_stamp(path), dataclasses.asdict(result)]
      log.write(json.dumps(line) + '\n')
      log.flush()
      progress(len(results), len(paths))

    while left := [path for path in paths if path not in results]:
      try:
        for i, result in in_processes(examine, [(path,) for path in left], workers):
          keep(left[i], result)
      except BrokenProcessPool:
        # A decoder crashed, or ran out of memory, and took the pool along. It was busy with one of
        # the first that are left (pools hand out in order): they are tried one by one, alone.
        for path in [path for path in left if path not in results][: 2 * workers + 1]:
          keep(path, _examine_alone(path))
  return results


def _examine_alone(path: str) -> Examined:
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    try:
      return pool.submit(examine, path).result()
    except BrokenProcessPool:
      return Examined(dead='the decoder crashed, or ran out of memory')


def _stamp(path: str) -> list[Any]:
  """Changes when a file does."""
  try:
    stat = Path(path).stat()
  except OSError:
    return [path, 0, 0]
  return [path, stat.st_size, stat.st_mtime_ns]


def _remembered(memory: Path, paths: Sequence[str]) -> dict[str, Examined]:
  wanted, results = set(paths), {}
  for line in memory.read_text().splitlines() if memory.exists() else ():
    try:
      stamp, fields = json.loads(line)
    except ValueError:  # the line at which the run was killed
      continue
    if stamp[0] in wanted and stamp == _stamp(stamp[0]):
      results[stamp[0]] = Examined(**fields)
  return results
