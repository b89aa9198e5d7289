"""Augmentation configuration."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from mevit_jax.config.validation import FRACTION, NOT_NEGATIVE, Range, Validated


@dataclasses.dataclass(frozen=True)
class AugmentConfig(Validated):
  """Augmentation of training clips, in this order; all disabled by default. docs/augmentation.md shows each.

  Attributes:
    flip: flip half of the clips horizontally. A class whose name has a direction ('moves_left') takes the label of its
      mirror image ('moves_right'); without such a class, its clips are not flipped.
    randaugment: number of RandAugment operations per clip; 0 disables it.
    randaugment_magnitude: mean magnitude; 10 is timm's maximum, values up to 30 extrapolate.
    randaugment_std: standard deviation of the magnitude.
    randaugment_probability: probability of each operation.
    color_jitter: probability of changing brightness, contrast, saturation and hue.
    brightness: maximum brightness change, for pixels in [0, 1].
    contrast: maximum deviation of the contrast factor from 1.
    saturation: maximum deviation of the saturation factor from 1.
    hue: maximum hue shift as a fraction of the color circle, at most 0.5.
    grayscale: probability of converting to grayscale.
    blur: probability of a Gaussian blur.
    blur_sigma: minimum and maximum standard deviation of the blur in pixels.
    erase: probability of random erasing; the same box in all frames.
    erase_area: minimum and maximum area of the box as a fraction of the frame.
    erase_aspect: minimum and maximum aspect ratio (height over width) of the box.
    erase_fill: 'noise' with the pixels' mean and standard deviation, or their 'mean'.
    mixup: alpha of mixup, lambda ~ Beta(alpha, alpha); pairs are neighbors in the batch; 0 disables it.
    cutmix: alpha of CutMix, box area ~ Beta(alpha, alpha); 0 disables it.
    mix_probability: probability that a pair is mixed.
    cutmix_share: fraction of mixed pairs that use CutMix when both are enabled.
  """

  group: ClassVar[str] = 'augment'
  flip: bool = False
  randaugment: Annotated[int, Range(0, 100)] = 0
  randaugment_magnitude: Annotated[float, Range(0, 30)] = 9.0
  randaugment_std: Annotated[float, NOT_NEGATIVE] = 0.5
  randaugment_probability: Annotated[float, FRACTION] = 0.5
  color_jitter: Annotated[float, FRACTION] = 0.0
  brightness: Annotated[float, FRACTION] = 32 / 255
  contrast: Annotated[float, FRACTION] = 0.4
  saturation: Annotated[float, FRACTION] = 0.4
  hue: Annotated[float, Range(0, 0.5)] = 0.2
  grayscale: Annotated[float, FRACTION] = 0.0
  blur: Annotated[float, FRACTION] = 0.0
  blur_sigma: tuple[float, ...] = (0.1, 2.0)
  erase: Annotated[float, FRACTION] = 0.0
  erase_area: tuple[float, ...] = (0.02, 1 / 3)
  erase_aspect: tuple[float, ...] = (0.3, 1 / 0.3)
  erase_fill: Literal['noise', 'mean'] = 'noise'
  mixup: Annotated[float, NOT_NEGATIVE] = 0.0
  cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
  mix_probability: Annotated[float, FRACTION] = 1.0
  cutmix_share: Annotated[float, FRACTION] = 0.5

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, high in (('blur_sigma', math.inf), ('erase_area', 1), ('erase_aspect', math.inf)):
      values = getattr(self, name)
      limit = '' if high == math.inf else f' and at most {high}'
      valid = len(values) == 2 and 0 < values[0] <= values[1] <= high
      self.require(valid, name, f'must be a minimum and a maximum, positive{limit}, not {values}')

  @property
  def enabled(self) -> bool:
    """True if any augmentation is enabled."""
    probabilities = self.randaugment, self.color_jitter, self.grayscale, self.blur, self.erase
    return self.flip or self.mixes or any(probabilities)

  @property
  def mixes(self) -> bool:
    """True if mixup or CutMix is enabled; each device then needs an even number of examples per microbatch."""
    return bool((self.mixup or self.cutmix) and self.mix_probability)
