"""The datasets that `mevit prepare` knows: their arguments, builders and configs, and what happens if one exists."""

import dataclasses
import difflib
import functools
import logging
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mevit_jax.datasets import builders, preparation, reader, shards, tasks
from mevit_jax.datasets.builders import files, kinetics, moving_shapes, something_something, video_folder
from mevit_jax.datasets.builders.files import Listing
from mevit_jax.errors import UserError
from mevit_jax.progress import Progress
from mevit_jax.video.transcode import Encoding

MAX_DRAWN_PIXELS = 2**25  # of all frames of a video of moving_shapes, which are drawn in memory at once

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Target:
  """A dataset to write.

  Attributes:
    data_dir: folder of all datasets.
    name: name of the dataset.
    arguments: arguments that decide the dataset's content.
    rename_flag: flag that would write another dataset beside this one.
    overwrite: True to replace a complete dataset.
  """

  data_dir: Path
  name: str
  arguments: Mapping[str, Any]
  rename_flag: str
  overwrite: bool

  @property
  def directory(self) -> Path:
    """Directory of the dataset."""
    return self.data_dir / self.name / builders.VERSION


@dataclasses.dataclass(frozen=True)
class Request:
  """Arguments of all datasets.

  Attributes:
    data_dir: folder of all datasets.
    executor: runs the tasks.
    name: name of the dataset; None derives it.
    overwrite: True to replace a complete dataset.
    encoding: 'keep' or 'h264'; None is the dataset's default.
    reencoding: settings of 'h264'.
    limits: fractions and limits, as in `preparation.Options`: max_unusable, max_missing, time_limit, max_bytes,
      max_pixels, validation_fraction.
    seed: seed of the drawn videos, or of the split.
    shapes: settings of moving_shapes: train_videos, validation_videos, frames, size.
    split_lists, fold: folder of UCF101's or HMDB51's split files, and the split to take; for video_folder.
    annotations: lists, or folders of lists; for the benchmarks.
  """

  data_dir: Path
  executor: tasks.Executor
  name: str | None = None
  overwrite: bool = False
  encoding: str | None = None
  reencoding: Encoding = dataclasses.field(default_factory=Encoding)
  limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seed: int = 0
  shapes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  split_lists: str | None = None
  fold: int = 1
  annotations: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Result:
  """A complete dataset.

  Attributes:
    target: the dataset.
    config: name of the config to train with.
    report: report of the preparation; None for drawn videos.
  """

  target: Target
  config: str
  report: Mapping[str, Any] | None = None


def prepare(kind: str, sources: Sequence[str], request: Request) -> Result | None:
  """Prepares a dataset; returns None if it was complete already.

  Args:
    kind: a key of `DATASETS`.
    sources: positional arguments: the folder or CSV file of the videos.
    request: all other arguments.

  Raises:
    UserError: the dataset is unknown, its arguments are wrong, or the preparation fails.
  """
  if kind not in DATASETS:
    nearest = difflib.get_close_matches(kind, DATASETS, n=1, cutoff=0.4)
    hint = f'; did you mean {nearest[0]}?' if nearest else ''
    raise UserError(f'unknown dataset {kind!r}; known: {", ".join(DATASETS)}{hint}')
  try:
    str(request.data_dir.absolute()).encode()
  except UnicodeEncodeError:
    raise UserError(
      f'--data_dir={request.data_dir} is not UTF-8, which array_record cannot write to; choose another folder'
    ) from None
  return DATASETS[kind](kind, sources, request)


def _prepare_moving_shapes(kind: str, sources: Sequence[str], request: Request) -> Result | None:
  if sources:
    raise UserError(f'moving_shapes takes no further arguments: {" ".join(sources)}')
  shapes = request.shapes
  if shapes['size'] % 2:
    raise UserError(f'--size={shapes["size"]} is odd; H.264 needs an even size')
  pixels = shapes['frames'] * shapes['size'] ** 2
  if pixels > MAX_DRAWN_PIXELS:
    raise UserError(
      f'--frames={shapes["frames"]} of --size={shapes["size"]} are {pixels:,} pixels per video, more than'
      f' {MAX_DRAWN_PIXELS:,}; reduce one of them'
    )
  arguments = {'kind': kind, **shapes, 'seed': request.seed}
  target = Target(request.data_dir, dataset_name(Path(kind), request.name), arguments, '--data_dir', request.overwrite)
  if is_up_to_date(target):
    return None
  videos = {'train': shapes['train_videos'], 'validation': shapes['validation_videos']}
  with shards.open_for_writing(target.directory, request.overwrite) as directory:
    size = shapes['frames'], shapes['size']
    builder = moving_shapes.build(directory.parents[1], videos, request.seed, *size, target.name)
    shards.write(builder, request.executor, Progress('videos written'), arguments=arguments)
  return Result(target, 'demo')


def _prepare_video_folder(kind: str, sources: Sequence[str], request: Request) -> Result | None:
  if len(sources) != 1:
    raise UserError('video_folder takes one folder or one CSV file: see --help')
  source = Path(sources[0]).expanduser()
  encoding = dataclasses.replace(request.reencoding, kind=request.encoding or 'keep')
  arguments = {'kind': kind, 'source': str(source.resolve()), 'encoding': files.encoding_settings(encoding)}
  fraction = request.limits['validation_fraction']
  split_arguments: dict[str, Any] = {'seed': request.seed, 'validation_fraction': fraction}
  if request.split_lists is not None:
    arguments |= {'lists': str(Path(request.split_lists).expanduser().resolve()), 'fold': str(request.fold)}
  name = dataset_name(source, request.name)
  target = Target(request.data_dir, name, {**arguments, **split_arguments}, '--name', request.overwrite)
  if is_up_to_date(target):
    return None
  listing = video_folder.find(source, request.split_lists, request.fold)
  if len(listing.class_names) < 2:
    raise UserError(f'{source} has one class only ({listing.class_names[0]}); a classifier needs at least two')
  if any(video.split for video in listing.videos):  # the splits are given: seed and fraction do not matter
    target = dataclasses.replace(target, arguments=arguments)
  return _prepare_files(target, listing, encoding, request, 'video_folder', all_classes=True)


def _prepare_benchmark(
  find: Callable[[Path, Sequence[Path]], Listing], config: str, kind: str, sources: Sequence[str], request: Request
) -> Result | None:
  """Prepares a dataset that comes with lists of its own."""
  if len(sources) != 1 or not request.annotations:
    raise UserError(f'{kind} takes one folder of videos, and --annotations=FILES_OR_FOLDERS: see --help')
  videos, *annotations = (Path(path).expanduser() for path in (sources[0], *request.annotations))
  encoding = dataclasses.replace(request.reencoding, kind=request.encoding or 'h264')
  arguments = {
    'kind': kind,
    'source': str(videos.resolve()),
    'annotations': [str(path.resolve()) for path in annotations],
    'encoding': files.encoding_settings(encoding),
  }
  target = Target(request.data_dir, dataset_name(Path(kind), request.name), arguments, '--name', request.overwrite)
  if is_up_to_date(target):
    return None
  return _prepare_files(target, find(videos, annotations), encoding, request, config, all_classes=False)


def _prepare_files(
  target: Target, listing: Listing, encoding: Encoding, request: Request, config: str, all_classes: bool
) -> Result:
  options = preparation.Options(
    executor=request.executor,
    encoding=encoding,
    seed=request.seed,
    keep=not target.overwrite and shards.was_complete(target.directory),
    all_classes=all_classes,
    **request.limits,
  )
  with shards.open_for_writing(target.directory, target.overwrite) as directory:
    report = preparation.prepare(directory, listing, target.arguments, options)
  return Result(target, config, report)


def _kinetics(classes: int) -> Callable[[Path, Sequence[Path]], Listing]:
  return functools.partial(kinetics.find, classes=classes)


# Functions of the dataset's key, the positional arguments and the request.
DATASETS: dict[str, Callable[[str, Sequence[str], Request], Result | None]] = {
  'moving_shapes': _prepare_moving_shapes,
  'video_folder': _prepare_video_folder,
  'kinetics400': functools.partial(_prepare_benchmark, _kinetics(400), 'k400'),
  'kinetics600': functools.partial(_prepare_benchmark, _kinetics(600), 'k600'),
  'kinetics700': functools.partial(_prepare_benchmark, _kinetics(700), 'k600'),
  'something_something_v2': functools.partial(_prepare_benchmark, something_something.find, 'ssv2'),
}


def dataset_name(source: Path, name: str | None) -> str:
  """Returns the given name of a dataset or, for None, one derived from its folder or file.

  Raises:
    UserError: the given name is not an identifier.
  """
  if name is None:
    path = source.resolve()
    derived = re.sub(r'[^a-z0-9]+', '_', (path.stem if path.is_file() else path.name).lower())
    derived = derived.strip('_') or 'videos'
    return derived if derived[0].isalpha() else f'videos_{derived}'
  if not re.fullmatch(r'[A-Za-z][A-Za-z0-9_]*', name):
    raise UserError(f'--name={name} must consist of letters, digits and _, and start with a letter')
  return name


def make_executor(workers: int = 0, beam_options: str | None = None) -> tasks.Executor:
  """Returns the executor for a number of worker processes (0: one per core) or, if given, for Beam's options."""
  if beam_options is None:
    return functools.partial(tasks.run_local, workers=workers or default_workers())
  from mevit_jax.datasets import beam  # imported here because Beam may not be installed

  return functools.partial(beam.run, options=shlex.split(beam_options))


def default_workers() -> int:
  """Returns the number of cores."""
  return os.cpu_count() or 1


def is_up_to_date(target: Target) -> bool:
  """Returns True if a dataset is complete, undamaged and not to be overwritten, and logs why nothing is done.

  Raises:
    UserError: the dataset was prepared with other arguments.
  """
  directory = target.directory
  shards.recover(directory)
  if target.overwrite or not reader.is_complete(directory):
    return False
  shards.restore_fingerprint(directory)
  saved, requested = reader.read_arguments(directory), target.arguments
  # Only saved arguments are compared: the others had no effect.
  changed = [key for key, value in saved.items() if value != requested.get(key)]
  if 'kind' in changed:
    changed = ['kind']  # the arguments of different kinds are not comparable
  if changed:
    differences = ', '.join(f'{key} {_as_flag(saved[key])} -> {_as_flag(requested.get(key))}' for key in changed)
    raise UserError(
      f'{directory} was prepared with other arguments (saved -> requested): {differences}; give {target.rename_flag} or'
      ' --overwrite'
    )
  if damaged := shards.find_damaged(directory):
    _LOG.info(
      '%s: %d shards are missing or truncated (%s, ...): writing them again', directory, len(damaged), damaged[0]
    )
    return False
  shards.rebuild_metadata(directory)
  action = 'continues to prepare' if shards.staging_directory(directory).exists() else 'prepares'
  _LOG.info('%s is already complete: nothing to do (--overwrite %s it again)', directory, action)
  return True


def _as_flag(value: Any) -> str:
  """Returns an argument as it is written in flags."""
  if isinstance(value, dict):  # see `files.encoding_settings`
    return ' '.join(f'{key}={setting}' for key, setting in value.items()) or 'keep'
  return ','.join(value) if isinstance(value, list) else str(value)


def describe(result: Result) -> str:
  """Returns the size and fingerprint of a prepared dataset, and the command that trains on it."""
  name, directory = result.target.name, result.target.directory
  size = sum(path.stat().st_size for path in directory.glob('*.array_record-*'))
  fingerprint, videos = reader.read_fingerprint(directory)
  counts = ', '.join(f'{count} {split}' for split, count in videos.items())
  lines = [
    f'{name}: {counts} videos, {size / 1e6:.1f} MB, in {directory}',
    f'fingerprint: {fingerprint}',
    f'next: mevit train --config={result.config} --workdir=WORKDIR --config.data.dataset={name}'
    f' --config.data.data_dir={shlex.quote(str(result.target.data_dir))}',
  ]
  if result.report is not None:
    lines.append(f'full report: {directory / "report.txt"}')
  return '\n'.join(lines)
