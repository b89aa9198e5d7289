"""Data configuration: dataset, clip sampling, normalization."""

import dataclasses
from typing import Annotated, ClassVar, Literal, NamedTuple

from mevit_jax.config.validation import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, Range, Validated


class Normalization(NamedTuple):
  """Mean and standard deviation of pixels in [0, 1], per RGB channel."""

  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class ClipConfig(Validated):
  """Frames and crop of a clip.

  Attributes:
    frames: number of frames.
    size: height and width of the crop in pixels.
    sampling: 'dense' (frames `stride` / 30 seconds apart) or 'uniform' (one frame from each of `frames` equal segments
      of the video).
    stride: distance between consecutive frames of a dense clip, in frames at 30 fps.
    short_side: range of random short-side lengths in pixels that training resizes to before cropping `size`.

  Raises:
    UserError: a value is out of range.
  """

  group: ClassVar[str] = 'data'
  frames: Annotated[int, COUNT] = 8
  size: Annotated[tuple[int, int], COUNT] = (224, 224)
  sampling: Literal['dense', 'uniform'] = 'dense'
  stride: Annotated[int, COUNT] = 32
  short_side: Annotated[tuple[int, int], COUNT] = (256, 320)

  def __post_init__(self) -> None:
    super().__post_init__()
    self.require(
      len(self.short_side) == 2 and min(self.size) <= self.short_side[0] <= self.short_side[1],
      'short_side',
      f'{self.short_side} must be an increasing range that starts at the short side of the crop {self.size} or above',
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Validated):
  """Dataset and clip sampling.

  Attributes:
    dataset: name of the prepared dataset.
    data_dir: folder that holds prepared datasets.
    train_split: split to train on.
    sampling: 'dense' (frames `stride` apart) or 'uniform' (one frame from each of equally long segments).
    stride: distance between consecutive frames of a dense clip, in frames at 30 fps of the video's own clock.
    short_side: range of random short-side lengths in pixels that training resizes to before the random crop; () is 8/7
      to 10/7 of the short side of `model.image_size`: 256 to 320 for 224.
    repeated_augmentation: number of differently augmented clips per decoded video in a batch (Hoffer et al. 2020). An
      epoch still visits every video once, and therefore has this many times the steps.
    class_balance: 0 samples videos uniformly, 1 samples classes uniformly; in between, a class is sampled in proportion
      to its number of videos to the power of 1 - class_balance. For small, imbalanced datasets.
    mean: pixel mean in [0, 1] per RGB channel; () is that of the pretrained weights or, from scratch, of the dataset.
    std: pixel standard deviation per RGB channel; () as for `mean`.
    workers: number of decoding processes; 0 decodes in threads of the main process.
  """

  group: ClassVar[str] = 'data'
  dataset: str = ''
  data_dir: str = 'data'
  train_split: str = 'train'
  sampling: Literal['dense', 'uniform'] = 'dense'
  stride: Annotated[int, COUNT] = 32
  short_side: Annotated[tuple[int, ...], COUNT] = ()
  repeated_augmentation: Annotated[int, COUNT] = 1
  class_balance: Annotated[float, FRACTION] = 0.0
  mean: Annotated[tuple[float, ...], NOT_NEGATIVE] = ()
  std: Annotated[tuple[float, ...], POSITIVE] = ()
  workers: Annotated[int, Range(0, 1024)] = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    for field in ('mean', 'std'):
      self.require(len(getattr(self, field)) in (0, 3), field, f'must be three numbers, not {getattr(self, field)}')
    self.require(len(self.short_side) <= 2, 'short_side', f'must be one or two numbers, not {self.short_side}')

  @property
  def normalization(self) -> Normalization:
    """Pixel mean and standard deviation; 0.5 if they are not set."""
    default = Normalization()
    return Normalization(self.mean or default.mean, self.std or default.std)
