"""Predictions of a split: every video exactly once, averaged over its views."""

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

_CHUNK = 1024  # videos whose views are averaged at once; bounds memory


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Predictions for every video of a split, in order.

  Attributes:
    ids: video ids, `n`.
    labels: class ids, `n`; -1 without a label.
    logits: logits of every view, float32 `n v c`; zeros for an unreadable video.
    errors: reasons why videos are unreadable, `n`; '' for readable ones.
    average: 'probabilities' or 'logits': the quantity averaged over views.
  """

  ids: np.ndarray
  labels: np.ndarray
  logits: np.ndarray
  errors: np.ndarray
  average: Average = 'probabilities'

  @functools.cached_property
  def readable(self) -> np.ndarray:
    """Mask of readable videos, bool `n`."""
    return self.errors == ''

  @functools.cached_property
  def probabilities(self) -> np.ndarray:
    """Class probabilities averaged over views, float64 `n c`; zeros for an unreadable video."""
    chunks = [averaged(self.logits[i : i + _CHUNK], self.average) for i in range(0, len(self.logits), _CHUNK)]
    return np.concatenate(chunks) * self.readable[:, None]

  def ranked(self, count: int) -> np.ndarray:
    """Returns the `count` most probable classes of every video, `n count`; ties go to the lowest class id."""
    return metrics.ranked(self.probabilities, count)


def describe_crops(sizes: np.ndarray, crop: tuple[int, int], crops: int) -> str:
  """Returns a line if the crops show less than three quarters of the frame of most videos, else ''.

  Args:
    sizes: height and width of every video, `n 2`.
    crop: height and width of a crop.
    crops: crops along the long side.
  """
  scales = (np.array(crop) / sizes).max(axis=1, keepdims=True)  # n 1
  visible = np.minimum(1, crops * (np.array(crop) / (scales * sizes)).prod(axis=1))  # n
  cut = visible < 0.75
  if cut.mean() <= 0.5:
    return ''
  shown = float(np.median(visible[cut]))
  return (
    f'{cut.sum():,} of {len(sizes):,} videos are cut: evaluation.crops={crops} shows {100 * shown:.0f} % of their '
    f'frames; --config.evaluation.crops={int(np.ceil(crops / shown))} shows all, or set model.image_size to their shape'
  )


def averaged(logits: np.ndarray, average: Average) -> np.ndarray:
  """Converts logits `n v c` to probabilities averaged over views, float64 `n c`."""
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
  """Predicts every video of `eval_batches` once; each host computes its part, and all hosts receive all predictions.

  Args:
    step: (params, video uint8 `b v t h w 3`) -> logits `b v c`.
    params: model parameters.
    batches: batches of one pass over a split.
    sharding: batch sharding.
    report: callback that receives the number of videos done, estimated from this host's part.
    average: 'probabilities' or 'logits': the quantity averaged over views.
  """
  parts: list[tuple[np.ndarray, ...]] = []
  for batch in batches:
    video = global_batch({'video': batch['video']}, sharding)['video']
    readable = (batch['error'] == '')[:, None, None]
    logits = np.where(readable, local_shards(step(params, video)).astype(np.float32), 0)  # b v c
    mask = batch['mask']  # False for padding
    columns = (batch['index'], batch['id'], batch['label'], logits, batch['error'])
    parts.append(tuple(x[mask] for x in columns))
    report(sum(len(part[0]) for part in parts) * jax.process_count())
  local = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
  all_hosts = [pickle.loads(part) for part in allgather_bytes(pickle.dumps(local))]
  index, *merged = (np.concatenate(arrays) for arrays in zip(*all_hosts, strict=True))
  _, unique = np.unique(index, return_index=True)  # hosts may hold the same part of a batch
  ids, labels, logits, errors = (array[unique] for array in merged)
  return Predictions(ids, labels, logits, errors, average)
