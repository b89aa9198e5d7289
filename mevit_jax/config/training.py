"""Training configuration: duration, batch, checkpoints, logging."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from mevit_jax.config.validation import COUNT, COUNT_OR_ZERO, DECAY, Range, Validated


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Validated):
  """Duration, batch size, checkpointing and logging.

  Attributes:
    epochs: passes over the training split.
    batch_size: global batch size, over all devices and hosts.
    accumulate: number of gradient accumulation steps: 1/k of the memory, the same update.
    label_smoothing: probability mass that is spread over all classes.
    seed: seed of initialization, shuffling, augmentation and all other randomness.
    log_every: steps between two log lines.
    save_every: steps between two checkpoints; the last step is always saved.
    keep: number of most recent checkpoints to keep.
    keep_best: whether to also keep the checkpoint with the best top-1 of the evaluations during training.
    ema: decay of the exponential moving average of the parameters, which is then evaluated; 0 disables it.
    on_nonfinite: a non-finite loss or gradient drops the update; then 'stop', or 'skip' it and continue.
    evaluate_every: steps between two evaluations, each with a checkpoint; 0 evaluates at the end only.
    patience: early stopping: training ends after this many evaluations (`evaluate_every`) without a better top-1, and
      the best checkpoint is evaluated; 0 trains to the end.
    cache_features: epochs of clips whose features are computed once, with a frozen encoder (`model.space_encoder`), and
      stored in WORKDIR/features; later epochs use them again in another order. 1 suits clips without random crops and
      augmentation. 0 computes features in every step.
    profile: first and last step to profile into WORKDIR/profile (TensorBoard, Perfetto); () disables it.
  """

  group: ClassVar[str] = 'training'
  epochs: Annotated[float, Range(0, 1e6, open_low=True)] = 15.0
  batch_size: Annotated[int, Range(1, 10**7)] = 64
  accumulate: Annotated[int, COUNT] = 1
  label_smoothing: Annotated[float, DECAY] = 0.0
  seed: Annotated[int, Range(0, 2**32 - 1)] = 0
  log_every: Annotated[int, Range(1, 10**9)] = 20
  save_every: Annotated[int, Range(1, 10**9)] = 1000
  keep: Annotated[int, Range(1, 10**9)] = 2
  keep_best: bool = True
  ema: Annotated[float, DECAY] = 0.0
  on_nonfinite: Literal['stop', 'skip'] = 'stop'
  evaluate_every: Annotated[int, Range(0, 10**9)] = 0
  patience: Annotated[int, Range(0, 10**9)] = 0
  cache_features: Annotated[int, COUNT_OR_ZERO] = 0
  profile: Annotated[tuple[int, ...], COUNT_OR_ZERO] = ()

  def __post_init__(self) -> None:
    super().__post_init__()
    self.require(
      self.batch_size % self.accumulate == 0,
      'batch_size',
      f'{self.batch_size} is not divisible by training.accumulate {self.accumulate}',
    )
    self.require(
      not self.patience or (self.evaluate_every > 0 and self.keep_best),
      'patience',
      f'{self.patience} needs training.evaluate_every, such as 100, and training.keep_best',
    )
    valid = not self.profile or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1])
    self.require(valid, 'profile', f'must be a first and a last step, starting at 1, not {self.profile}')
