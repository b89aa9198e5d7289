"""Optimizer configuration."""

import dataclasses
import re
from typing import Annotated, ClassVar, Literal

from mevit_jax.config.validation import COUNT, DECAY, NOT_NEGATIVE, Range, Validated


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Validated):
  """Optimizer and learning rate schedule; epochs are measured in training examples.

  Attributes:
    name: 'sgd' (Nesterov momentum, weight decay in the gradient) or 'adamw' (decoupled weight decay).
    learning_rate: peak learning rate at `base_batch_size`; scaled linearly with the batch size (Goyal et al. 2017).
    base_batch_size: global batch size that `learning_rate` refers to.
    momentum: momentum of SGD.
    beta1: AdamW's decay of the first moment.
    beta2: AdamW's decay of the second moment.
    weight_decay: weight decay rate.
    no_decay: regular expression (re.search on parameter paths) of parameters without weight decay; '' decays all.
    freeze: regular expression of parameters that are not trained; '^(?!head)' trains the head only.
    layer_decay: layer-wise learning rate decay per block below the head (Clark et al. 2020); 1 disables it.
    schedule: 'steps' (times `decay_factor` at each of `decay_epochs`) or 'cosine' (to zero at the end).
    decay_epochs: epochs at which the learning rate drops.
    decay_factor: factor of each drop.
    warmup_epochs: epochs of linear warm-up from zero.
    clip_norm: maximum global gradient norm; 0 disables clipping.
  """

  group: ClassVar[str] = 'optimizer'
  name: Literal['sgd', 'adamw'] = 'sgd'
  learning_rate: Annotated[float, Range(0)] = 0.005
  base_batch_size: Annotated[int, COUNT] = 64
  momentum: Annotated[float, DECAY] = 0.9
  beta1: Annotated[float, DECAY] = 0.9
  beta2: Annotated[float, DECAY] = 0.999
  weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
  no_decay: str = ''
  freeze: str = ''
  layer_decay: Annotated[float, Range(0, 1, open_low=True)] = 1.0
  schedule: Literal['steps', 'cosine'] = 'steps'
  decay_epochs: Annotated[tuple[float, ...], Range(0, 1e6)] = (11.0, 14.0)
  decay_factor: Annotated[float, Range(0, 1e6, open_low=True)] = 0.1
  warmup_epochs: Annotated[float, Range(0, 1e6)] = 0.0
  clip_norm: Annotated[float, NOT_NEGATIVE] = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    for field in ('no_decay', 'freeze'):
      try:
        re.compile(getattr(self, field))
      except re.error as error:
        self.require(False, field, f'is not a regular expression: {error}')
