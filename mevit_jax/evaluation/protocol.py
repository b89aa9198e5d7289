"""Evaluation: every video once, over views, with the protocol named."""

import dataclasses
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import jax
import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.models.functional import Params
from mevit_jax.parallel.distributed import gathered
from mevit_jax.parallel.hosts import global_batch, host_part


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Which videos, and which views of them: clips x crops, whose probabilities are averaged.

  Attributes:
    split: of the dataset.
    clips: in time: one is the centre one, more are spread evenly, ends included.
    crops: of each clip, along the frame's long side: one is the centre one, three are both ends and the centre.
    batch_size: videos at once, over all devices and hosts; results do not depend on it.
    weights: of the model: 'ema' (their running mean, see training.ema), 'raw', or 'auto' (the mean where there is one).
    checkpoint: which to evaluate, once trained: 'last', 'best' (of the evaluations while it trained) or a step.
  """

  split: str = 'validation'
  clips: int = 1
  crops: int = 3
  batch_size: int = 32
  weights: Literal['auto', 'ema', 'raw'] = 'auto'
  checkpoint: str = 'last'

  def __post_init__(self):
    if self.weights not in ('auto', 'ema', 'raw'):
      raise UserError(f"evaluation.weights must be 'auto', 'ema' or 'raw', not {self.weights!r}")
    if self.checkpoint not in ('last', 'best') and not self.checkpoint.isdecimal():
      raise UserError(f"evaluation.checkpoint must be 'last', 'best' or a step, not {self.checkpoint!r}")
    for name in ('clips', 'crops', 'batch_size'):
      if getattr(self, name) < 1:
        raise UserError(f'evaluation.{name} must be at least 1, not {getattr(self, name)}')

  @property
  def name(self) -> str:
    """Of the protocol, and of the folder of its results: 'validation-1x3', 'validation-1x3-raw-best'."""
    weights = '' if self.weights == 'auto' else f'-{self.weights}'
    checkpoint = '' if self.checkpoint == 'last' else f'-{self.checkpoint}'
    return f'{self.split}-{self.clips}x{self.crops}{weights}{checkpoint}'


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What a model says of every video of a split, in the split's order.

  Attributes:
    ids: `n`: the videos.
    labels: `n`: their labels.
    probabilities: `n c`, float32; zeros for a video that could not be read.
    errors: `n`: why a video could not be read; '' for the others.
  """

  ids: np.ndarray
  labels: np.ndarray
  probabilities: np.ndarray
  errors: np.ndarray

  @property
  def readable(self) -> np.ndarray:
    """Which videos could be read, `n`."""
    return self.errors == ''

  def ranked(self, count: int) -> np.ndarray:
    """The `count` likeliest classes of every video, `n count`; ties go to the lowest class."""
    return np.argsort(-self.probabilities, axis=1, kind='stable')[:, :count]


def predict_all(
  step: Callable[[Params, jax.Array], jax.Array],
  params: Params,
  batches: Iterable[Mapping[str, np.ndarray]],
  sharding: jax.sharding.Sharding,
  report: Callable[[int], None] = lambda done: None,
) -> Predictions:
  """Predicts every video of `eval_batches`, once; with many hosts, each predicts its rows, and all know all of them.

  Args:
    step: (params, video uint8 `b v t h w 3`) -> probabilities `b c`.
    params: of the model.
    batches: of one pass over a split.
    sharding: of a batch.
    report: called with the number of videos done, as far as this host can tell.
  """
  parts: list[tuple[np.ndarray, ...]] = []
  for batch in batches:
    video = global_batch({'video': batch['video']}, sharding)['video']
    probabilities = host_part(step(params, video)).astype(np.float32) * (batch['error'] == '')[:, None]
    real = batch['mask']
    rows = (batch['index'], batch['id'], batch['label'], probabilities, batch['error'])
    parts.append(tuple(x[real] for x in rows))
    report(sum(len(part[0]) for part in parts) * jax.process_count())
  mine = [np.concatenate(column) for column in zip(*parts, strict=True)]
  everyone = [pickle.loads(part) for part in gathered(pickle.dumps(mine))]
  index, *columns = (np.concatenate(column) for column in zip(*everyone, strict=True))
  _, once = np.unique(index, return_index=True)  # hosts may share rows
  return Predictions(*(column[once] for column in columns))
