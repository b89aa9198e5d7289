"""The datasets: TFDS builders that declare names, features and splits; `data/shards.py` writes."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

VERSION = '1.0.0'


def features(class_names: Sequence[str]) -> tfds.features.FeaturesDict:
  """What an example of every dataset holds: a video file's bytes, its label, and what it is."""
  return tfds.features.FeaturesDict(
    {
      'video': tfds.features.Scalar(np.object_, doc='The encoded file, as it was found.'),
      'label': tfds.features.ClassLabel(names=list(class_names)),
      'id': tfds.features.Text(doc='Names the video, the same on every machine.'),
      'num_frames': tfds.features.Scalar(np.int64, doc='Frames that decode.'),
      'fps': tfds.features.Scalar(np.float32, doc='Frames a second.'),
      'duration': tfds.features.Scalar(np.float32, doc='Seconds.'),
      'height': tfds.features.Scalar(np.int64, doc='Pixels.'),
      'width': tfds.features.Scalar(np.int64, doc='Pixels.'),
    }
  )


class VideoBuilder(tfds.core.GeneratorBasedBuilder):
  """A dataset of labelled videos.

  Attributes:
    class_names: label i is the i-th name.
    shards: for each split, for each shard, its items, in order. An item's repr says all that its
      example depends on: by it a shard of an earlier run is known to be the same.
  """

  VERSION = tfds.core.Version(VERSION)

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

  @staticmethod
  @abc.abstractmethod
  def make(item: Any) -> dict[str, Any]:
    """Turns an item into an example; other processes call it."""

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
