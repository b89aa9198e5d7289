"""Evaluation: every video once, over views, with the protocol named."""

import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from mevit_jax.config.evaluation import Average
from mevit_jax.evaluation import metrics
from mevit_jax.models.functional import Params
from mevit_jax.parallel.distributed import allgather_bytes
from mevit_jax.parallel.hosts import global_batch, local_shards

_CHUNK = 1024  # videos whose views are averaged at once: bounds memory, and changes no bit


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
    logits = np.where(readable, local_shards(step(params, video)).astype(np.float32), 0)  # b v c
    real = batch['mask']
    rows = (batch['index'], batch['id'], batch['label'], logits, batch['error'])
    parts.append(tuple(x[real] for x in rows))
    report(sum(len(part[0]) for part in parts) * jax.process_count())
  mine = [np.concatenate(column) for column in zip(*parts, strict=True)]
  everyone = [pickle.loads(part) for part in allgather_bytes(pickle.dumps(mine))]
  index, *columns = (np.concatenate(column) for column in zip(*everyone, strict=True))
  _, once = np.unique(index, return_index=True)  # hosts may share rows
  ids, labels, logits, errors = (column[once] for column in columns)
  return Predictions(ids, labels, logits, errors, average)
