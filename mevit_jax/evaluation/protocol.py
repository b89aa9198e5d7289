"""Evaluation: every video once, over views, with the protocol named."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import jax
import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.evaluation import metrics
from mevit_jax.models.functional import Params
from mevit_jax.parallel.hosts import global_batch

Average = Literal['probabilities', 'logits']
_CHUNK = 1024  # videos whose views are averaged at once: bounds memory, and changes no bit


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Which videos, and which views of them: clips x crops, over which what the model says is averaged.

  Attributes:
    split: of the dataset.
    clips: in time: one is the centre one, more are spread evenly, ends included.
    crops: of each clip, along the frame's long side: one is the centre one, three are both ends and the centre.
    views: clips and crops in one word, as a paper names a protocol: '4x3'; '' leaves them as they are.
    average: over the views, 'probabilities' or 'logits'.
    batch_size: videos at once, over all devices and hosts; results do not depend on it.
  """

  split: str = 'validation'
  clips: int = 1
  crops: int = 3
  views: str = ''
  average: Average = 'probabilities'
  batch_size: int = 32

  def __post_init__(self):
    if self.views:
      named = re.fullmatch(r'(\d+)x(\d+)', self.views)
      if not named:
        raise UserError(f"evaluation.views is clips x crops, as '4x3', not {self.views!r}")
      # One protocol is one config, however it was asked for.
      for name, value in (('clips', int(named[1])), ('crops', int(named[2])), ('views', '')):
        object.__setattr__(self, name, value)
    if self.average not in ('probabilities', 'logits'):
      raise UserError(f"evaluation.average must be 'probabilities' or 'logits', not {self.average!r}")
    for name in ('clips', 'crops', 'batch_size'):
      if getattr(self, name) < 1:
        raise UserError(f'evaluation.{name} must be at least 1, not {getattr(self, name)}')

  @property
  def name(self) -> str:
    """Of the protocol, and of the folder of its results: 'validation-1x3', 'validation-4x3-logits'."""
    average = '' if self.average == 'probabilities' else f'-{self.average}'
    return f'{self.split}-{self.clips}x{self.crops}{average}'


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What a model says of every video of a split, in the split's order.

  Attributes:
    ids: `n`: the videos.
    labels: `n`: their labels; -1 for a video without.
    logits: `n v c`, float32: of every view; zeros for a video that could not be read.
    errors: `n`: why a video could not be read; '' for the others.
    average: over the views, of probabilities or of logits.
  """

  ids: np.ndarray
  labels: np.ndarray
  logits: np.ndarray
  errors: np.ndarray
  average: Average = 'probabilities'

  @functools.cached_property
  def readable(self) -> np.ndarray:
    """Which videos could be read, `n`."""
    return self.errors == ''

  @functools.cached_property
  def probabilities(self) -> np.ndarray:
    """Of every video and class, `n c`, float64: averaged over the views; zeros for a video that could not be read."""
    averaged = [_averaged(self.logits[i : i + _CHUNK], self.average) for i in range(0, len(self.logits), _CHUNK)]
    return np.concatenate(averaged) * self.readable[:, None]

  def ranked(self, count: int) -> np.ndarray:
    """The `count` likeliest classes of every video, `n count`; ties go to the lowest class."""
    return metrics.ranked(self.probabilities, count)


def _averaged(logits: np.ndarray, average: Average) -> np.ndarray:
  """Probabilities `n c` of logits `n v c`."""
  logits = logits.astype(np.float64)
  if average == 'logits':
    logits = logits.mean(axis=1, keepdims=True)
  exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return (exponentials / exponentials.sum(axis=-1, keepdims=True)).mean(axis=1)


def predict_all(
  step: Callable[[Params, jax.Array], jax.Array],
  params: Params,
  batches: Iterable[Mapping[str, np.ndarray]],
  sharding: jax.sharding.Sharding,
  report: Callable[[int], None] = lambda done: None,
  average: Average = 'probabilities',
) -> Predictions:
  """Predicts every video of `eval_batches`, once.

  Args:
    step: (params, video uint8 `b v t h w 3`) -> logits `b v c`.
    params: of the model.
    batches: of one pass over a split.
    sharding: of a batch.
    report: called with the number of videos done.
    average: over the views.
  """
  parts: list[tuple[np.ndarray, ...]] = []
  for batch in batches:
    video = global_batch({'video': batch['video']}, sharding)['video']
    logits = np.where((batch['error'] == '')[:, None, None], np.asarray(step(params, video), np.float32), 0)
    real = batch['mask']
    parts.append(tuple(x[real] for x in (batch['id'], batch['label'], logits, batch['error'])))
    report(sum(len(part[0]) for part in parts))
  ids, labels, logits, errors = (np.concatenate(column) for column in zip(*parts, strict=True))
  return Predictions(ids, labels, logits, errors, average)
