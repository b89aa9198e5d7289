"""Weights of another library, or of another workdir, as the params of a model."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.models.functional import Model, Params, check_params
from mevit_jax.pretrained.assign import Assignment, Row, check_sizes, format_table
from mevit_jax.pretrained.source import Source, SourceInfo, open_source

Head = Literal['auto', 'keep', 'fresh']


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Params, and an account of them.

  Attributes:
    params: of the model, NumPy arrays.
    table: a row for every parameter, and one for every name of the source that is not used.
    info: of the source, as it says it (see `open_source`).
  """

  params: Params
  table: tuple[Row, ...]
  info: SourceInfo

  def report(self) -> str:
    """The table as text, and one line that sums it up."""
    counts = collections.Counter(row.status for row in self.table)
    return f'{format_table(self.table)}\n{self.info.kind}: ' + ', '.join(f'{n} {what}' for what, n in counts.items())


def load(
  source: str | Path | Source,
  model: Model,
  *,
  class_names: Sequence[str] | None = None,
  head: Head = 'auto',
  key: jax.Array | None = None,
) -> Loaded:
  """Reads weights into the params of a model.

  Args:
    source: an open source (see `open_source`), or its path.
    model: its `layer_norm_eps` must be the source's (`source.info`).
    class_names: of the model's classes.
    head: 'auto' keeps the source's head, row by row, where both name the same classes; 'keep' takes it as it is (the
      caller knows that class i is class i: only their number is checked); 'fresh' does not.
    key: for motion attention that starts at random (`motion_init`).

  Raises:
    UserError: damaged, of an unknown kind, of another size, or with names unknown or missing.
  """
  if not isinstance(source, Source):
    source = open_source(source, model.config.heads)
  check_sizes(source, model.config)
  if source.info.layer_norm_eps != model.config.layer_norm_eps:
    raise UserError(
      f'{source.info.kind} has LayerNorms of eps {source.info.layer_norm_eps:g}: '
      f'--config.model.layer_norm_eps={source.info.layer_norm_eps:g}, not {model.config.layer_norm_eps:g}'
    )
  order, note = _match_heads(source, model.config.classes, class_names, head)
  landing = Assignment(source, model, order, note)
  params = landing.params(jax.random.key(0) if key is None else key)
  check_params(params, model.abstract)
  if source.channel_order == 'bgr':  # the model always takes RGB
    params['embedding']['kernel'] = np.ascontiguousarray(params['embedding']['kernel'][:, :, ::-1])
  return Loaded(params, tuple(landing.rows), source.info)


def _match_heads(
  source: Source, classes: int, class_names: Sequence[str] | None, head: Head
) -> tuple[np.ndarray | None, str]:
  """The source's class for each of the model's (None: a fresh head), and a note for the table."""
  info = source.info
  reason = _no_head(source, head)
  if reason:
    return None, reason
  if head == 'keep':
    if info.classes != classes:
      raise UserError(f'the head of {info.kind} has {info.classes} classes and the model {classes}: it cannot be kept')
    return np.arange(classes), ' (kept as asked)'
  if info.class_names is None or class_names is None:
    return None, 'the names of its classes are not known (head=keep keeps it where the classes are the same)'
  theirs, ours = list(info.class_names), list(class_names)
  if theirs == ours:
    return np.arange(classes), ''
  if len(set(theirs)) == len(theirs) and sorted(theirs) == sorted(ours):
    return np.array([theirs.index(name) for name in ours]), ' (rows ordered by name)'
  other = next(iter(set(theirs) - set(ours)), None)
  return None, 'its classes are others' + (f' ({other!r}, for one)' if other else '')


def _no_head(source: Source, head: Head) -> str:
  """Why there is no head to keep, or ''."""
  if head == 'fresh':
    return 'as asked'
  reason = ''
  if not source.info.classes:
    reason = 'the source has none'
  elif any('pre_logits' in name for name in source.unused):
    reason = 'its head is behind pre_logits'
  if reason and head == 'keep':
    raise UserError(f'the head of {source.info.kind} cannot be kept: {reason}')
  return reason
