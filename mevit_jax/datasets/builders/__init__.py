"""TFDS builders: names, features and splits of datasets. `datasets/shards.py` writes their shards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mevit_jax.errors import UserError

VERSION = '1.0.0'


def features(class_names: Sequence[str]) -> tfds.features.FeaturesDict:
  """Returns the features of every dataset: the bytes of a video file, its label and its properties."""
  return tfds.features.FeaturesDict(
    {
      'video': tfds.features.Scalar(np.object_, doc='Encoded video file.'),
      'label': tfds.features.ClassLabel(names=list(class_names)),  # -1: no label
      'id': tfds.features.Text(doc='Id of the video, the same on every machine.'),
      'num_frames': tfds.features.Scalar(np.int64, doc='Number of frames that decode.'),
      'fps': tfds.features.Scalar(np.float32, doc='Frames per second.'),
      'duration': tfds.features.Scalar(np.float32, doc='Seconds.'),
      'height': tfds.features.Scalar(np.int64, doc='Pixels.'),
      'width': tfds.features.Scalar(np.int64, doc='Pixels.'),
    }
  )


def _raise_crash(item: Any, reason: str) -> dict[str, Any]:
  raise UserError(f'a process that made {item} ended: {reason}; run the command again to continue')


class VideoBuilder(tfds.core.GeneratorBasedBuilder):
  """A dataset of labelled videos.

  Attributes:
    class_names: name of each label id.
    shards: items of each shard of each split, in an order that is the same on every machine. The repr of an item and
      `encoding` determine its example: a shard of an earlier run is reused if they are the same.
    make: function of an item that returns its example; called in worker processes. Besides the `features`, the example
      may hold `sha256` (of the source file, where `video` was re-encoded), `damage` (one line: the part that does not
      decode) and `unusable` (one line: the reason why the video is left out; then only `id` and `label` are required).
    unusable_example: function of an item that crashed its process, and of the reason, that returns its example.
    encoding: settings of re-encoded videos; empty if their bytes are kept.
    time_limit: seconds after which the process that makes an example is ended; 0 disables the limit.
  """

  VERSION = tfds.core.Version(VERSION)
  make: Callable[[Any], dict[str, Any]]
  unusable_example: Callable[[Any, str], dict[str, Any]] = staticmethod(_raise_crash)
  encoding: Mapping[str, Any] = MappingProxyType({})
  time_limit: float = 0

  def __init__(
    self,
    data_dir: str | Path,
    name: str,
    class_names: Sequence[str],
    shards: Mapping[str, Sequence[Sequence[Any]]],
  ):
    self.name = name
    self.class_names = tuple(class_names)
    self.shards = shards
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=features(self.class_names),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager
    return {split: self._generate_examples(shards) for split, shards in self.shards.items()}

  def _generate_examples(self, shards: Sequence[Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for example in (self.make(item) for items in shards for item in items):
      yield example['id'], example
