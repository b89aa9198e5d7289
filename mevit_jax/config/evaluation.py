"""Evaluation configuration: split, views, checkpoint."""

import dataclasses
import re
from typing import Annotated, ClassVar, Literal

from mevit_jax.config.validation import COUNT_OR_ZERO, Range, Validated

Average = Literal['probabilities', 'logits']


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Validated):
  """Evaluation protocol: views per video are clips x crops, whose predictions are averaged.

  Attributes:
    split: dataset split.
    clips: temporal views; one is the center clip, more are evenly spaced, both ends included.
    crops: spatial views along the long side; one is the center crop, three are both ends and the center.
    views: clips and crops in one string, as papers write it: '4x3'; '' keeps `clips` and `crops`.
    average: averaging of views, over 'probabilities' or 'logits'.
    batch_size: videos per batch over all devices and hosts, rounded up to a multiple of the devices; results do not
      depend on it.
    weights: 'ema' parameters, 'raw' parameters, or 'auto' (EMA if the checkpoint has it).
    checkpoint: 'last', 'best' (by evaluations during training) or a step.
    attention_maps: number of videos whose attention maps the report shows; on one host.
  """

  group: ClassVar[str] = 'evaluation'
  split: str = 'validation'
  clips: Annotated[int, Range(1, 1000)] = 1
  crops: Annotated[int, Range(1, 100)] = 3
  views: str = ''
  average: Average = 'probabilities'
  batch_size: Annotated[int, Range(1, 10**6)] = 32
  weights: Literal['auto', 'ema', 'raw'] = 'auto'
  checkpoint: str = 'last'
  attention_maps: Annotated[int, COUNT_OR_ZERO] = 2

  def __post_init__(self) -> None:
    if self.views:
      match = re.fullmatch(r'(\d+)x(\d+)', self.views)
      if match is None:
        self.require(False, 'views', f"must be clips x crops, such as '4x3', not {self.views!r}")
      else:  # One protocol is one config, however it was written.
        for name, value in (('clips', int(match[1])), ('crops', int(match[2])), ('views', '')):
          object.__setattr__(self, name, value)
    super().__post_init__()
    valid = self.checkpoint in ('last', 'best') or self.checkpoint.isdecimal()
    self.require(valid, 'checkpoint', f"must be 'last', 'best' or a step, not {self.checkpoint!r}")

  @property
  def name(self) -> str:
    """Name of the protocol and of its results folder: 'validation-1x3', 'validation-4x3-logits-raw-best'."""
    average = '' if self.average == 'probabilities' else f'-{self.average}'
    weights = '' if self.weights == 'auto' else f'-{self.weights}'
    checkpoint = '' if self.checkpoint == 'last' else f'-{self.checkpoint}'
    return f'{self.split}-{self.clips}x{self.crops}{average}{weights}{checkpoint}'
