"""The datasets: TFDS builders that declare names, features and splits; `data/shards.py` writes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mevit_jax.errors import UserError

VERSION = '1.0.0'


def features(class_names: Sequence[str]) -> tfds.features.FeaturesDict:
  """What an example of every dataset holds: a video file's bytes, its label, and what it is."""
  return tfds.features.FeaturesDict(
    {
      'video': tfds.features.Scalar(np.object_, doc='The encoded file.'),
      'label': tfds.features.ClassLabel(names=list(class_names)),  # -1: none
      'id': tfds.features.Text(doc='Names the video, the same on every machine.'),
      'num_frames': tfds.features.Scalar(np.int64, doc='Frames that decode.'),
      'fps': tfds.features.Scalar(np.float32, doc='Frames a second.'),
      'duration': tfds.features.Scalar(np.float32, doc='Seconds.'),
      'height': tfds.features.Scalar(np.int64, doc='Pixels.'),
      'width': tfds.features.Scalar(np.int64, doc='Pixels.'),
    }
  )


def _no_video(item: Any, reason: str) -> dict[str, Any]:
  raise UserError(f'a process that made {item} ended: {reason}; run the command again to go on')


class VideoBuilder(tfds.core.GeneratorBasedBuilder):
  """A dataset of labelled videos.

  Attributes:
    class_names: label i is the i-th name.
    shards: for each split, for each shard, its items, in an order that is the same on every
      machine. An item's repr, together with `encoding`, says all that its example depends on: by
      it a shard of an earlier run is known to be the same.
    make: turns an item into an example; other processes call it. Beside what is in `features`, the
      example may hold `sha256`, of the bytes as they were found (of `video` if it is not there),
      `damage`, a line on what of it does not decode, and `dead`, a line on why it is left out: then
      only `id` and `label` must be there.
    dead: likewise, for an item that took its process down, and a line on how.
    encoding: how videos were encoded anew; empty where their bytes are kept.
    time_limit: seconds after which the process that makes an example is ended; 0: never.
  """

  VERSION = tfds.core.Version(VERSION)
  make: Callable[[Any], dict[str, Any]]
  dead: Callable[[Any, str], dict[str, Any]] = staticmethod(_no_video)
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
