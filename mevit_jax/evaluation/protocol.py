"""Evaluation: every video once, over views, with the protocol named."""

import dataclasses
import functools
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import jax
import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.evaluation import metrics
from mevit_jax.models.functional import Params
from mevit_jax.parallel.distributed import gathered
from mevit_jax.parallel.hosts import global_batch, host_part

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
    batch_size: videos at once, over all devices and hosts, or a few more if they do not divide it; results do not
      depend on it.
    weights: of the model: 'ema' (their running mean, see training.ema), 'raw', or 'auto' (the mean where there is one).
    checkpoint: which to evaluate, once trained: 'last', 'best' (of the evaluations while it trained) or a step.
    looks: of how many videos the report shows where the model looks; on one host.
  """

  split: str = 'validation'
  clips: int = 1
  crops: int = 3
  views: str = ''
  average: Average = 'probabilities'
  batch_size: int = 32
  weights: Literal['auto', 'ema', 'raw'] = 'auto'
  checkpoint: str = 'last'
  looks: int = 2

  def __post_init__(self):
    if self.weights not in ('auto', 'ema', 'raw'):
      raise UserError(f"evaluation.weights must be 'auto', 'ema' or 'raw', not {self.weights!r}")
    if self.checkpoint not in ('last', 'best') and not self.checkpoint.isdecimal():
      raise UserError(f"evaluation.checkpoint must be 'last', 'best' or a step, not {self.checkpoint!r}")
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
    if self.looks < 0:
      raise UserError(f'evaluation.looks must not be negative, and is {self.looks}')

  @property
  def name(self) -> str:
    """Of the protocol, and of the folder of its results: 'validation-1x3', 'validation-4x3-logits-raw-best'."""
    average = '' if self.average == 'probabilities' else f'-{self.average}'
    weights = '' if self.weights == 'auto' else f'-{self.weights}'
    checkpoint = '' if self.checkpoint == 'last' else f'-{self.checkpoint}'
    return f'{self.split}-{self.clips}x{self.crops}{average}{weights}{checkpoint}'

  def shared(self, parts: int) -> 'EvaluationConfig':
    """With a batch that devices can cut into so many equal parts: as it is, or the next larger, which it then says."""
    size = -(-self.batch_size // parts) * parts
    if size != self.batch_size:
      print(f'evaluation.batch_size {self.batch_size} is taken as {size}: it is cut into {parts} parts', flush=True)
    return dataclasses.replace(self, batch_size=size)


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
    chunks = [averaged(self.logits[i : i + _CHUNK], self.average) for i in range(0, len(self.logits), _CHUNK)]
    return np.concatenate(chunks) * self.readable[:, None]

  def ranked(self, count: int) -> np.ndarray:
    """The `count` likeliest classes of every video, `n count`; ties go to the lowest class."""
    return metrics.ranked(self.probabilities, count)


def averaged(logits: np.ndarray, average: Average) -> np.ndarray:
  """Probabilities `n c`, float64, of logits `n v c`: averaged over the views."""
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
  """Predicts every video of `eval_batches`, once; with many hosts, each predicts its rows, and all know all of them.

  Args:
    step: (params, video uint8 `b v t h w 3`) -> logits `b v c`.
    params: of the model.
    batches: of one pass over a split.
    sharding: of a batch.
    report: called with the number of videos done, as far as this host can tell.
    average: over the views.
  """
  parts: list[tuple[np.ndarray, ...]] = []
  for batch in batches:
    video = global_batch({'video': batch['video']}, sharding)['video']
    readable = (batch['error'] == '')[:, None, None]
    logits = np.where(readable, host_part(step(params, video)).astype(np.float32), 0)  # b v c
    real = batch['mask']
    rows = (batch['index'], batch['id'], batch['label'], logits, batch['error'])
    parts.append(tuple(x[real] for x in rows))
    report(sum(len(part[0]) for part in parts) * jax.process_count())
  mine = [np.concatenate(column) for column in zip(*parts, strict=True)]
  everyone = [pickle.loads(part) for part in gathered(pickle.dumps(mine))]
  index, *columns = (np.concatenate(column) for column in zip(*everyone, strict=True))
  _, once = np.unique(index, return_index=True)  # hosts may share rows
  ids, labels, logits, errors = (column[once] for column in columns)
  return Predictions(ids, labels, logits, errors, average)
