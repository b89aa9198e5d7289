"""Loading weights of another library, or of another workdir, into the parameters of a model."""

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
  """Parameters and the origin of each.

  Attributes:
    params: parameters of the model, NumPy arrays.
    table: a row for every parameter, and for every tensor of the source that is not used.
    info: properties of the source.
  """

  params: Params
  table: tuple[Row, ...]
  info: SourceInfo

  def report(self) -> str:
    """Returns the table as text, and a line with the counts."""
    counts = collections.Counter(row.status for row in self.table)
    return f'{format_table(self.table)}\n{self.info.kind}: ' + ', '.join(
      f'{n} {status}' for status, n in counts.items()
    )


def load(
  source: str | Path | Source,
  model: Model,
  *,
  class_names: Sequence[str] | None = None,
  head: Head = 'auto',
  key: jax.Array | None = None,
) -> Loaded:
  """Loads weights into the parameters of a model.

  Args:
    source: open source (see `open_source`), or its path.
    model: model to load into; its `layer_norm_eps`, `activation`, `pre_norm` and `rotary_theta` must be those of the
      source, `source.info.model_fields`.
    class_names: names of the model's classes.
    head: 'auto' keeps the source's head, with its rows reordered by name, if both name the same classes; 'keep' keeps
      it as it is (the caller knows that the classes are the same: only their number is checked); 'fresh' initializes.
    key: random key for motion attention with `motion_init='random'`.

  Raises:
    UserError: the source is damaged, has an unknown format or a different size, or names are unknown or missing.
  """
  if not isinstance(source, Source):
    source = open_source(source, model.config.heads)
  check_sizes(source, model.config)
  for name, value in source.info.model_fields.items():
    if value != getattr(model.config, name):
      raise UserError(
        f'{source.info.kind} has a different {name} from the model (source -> model): '
        f'{value} -> {getattr(model.config, name)}; use --config.model.{name}={value}'
      )
  class_order, note = _match_classes(source, model.config.classes, class_names, head)
  assignment = Assignment(source, model, class_order, note)
  params = assignment.assign(jax.random.key(0) if key is None else key)
  check_params(params, model.abstract)
  if source.channel_order == 'bgr':  # the model always takes RGB
    params['embedding']['kernel'] = np.ascontiguousarray(params['embedding']['kernel'][:, :, ::-1])
  return Loaded(params, tuple(assignment.rows), source.info)


def _match_classes(
  source: Source, classes: int, class_names: Sequence[str] | None, head: Head
) -> tuple[np.ndarray | None, str]:
  """Returns the source's class for each class of the model (None: a fresh head), and a note for the table."""
  info = source.info
  reason = _fresh_reason(source, head)
  if reason:
    return None, reason
  if head == 'keep':
    if info.classes != classes:
      raise UserError(
        f'the head of {info.kind} has {info.classes} classes and the model has {classes}: use init_head=fresh'
      )
    return np.arange(classes), ' (init_head=keep)'
  if info.class_names is None or class_names is None:
    return None, 'the source has no class names (init_head=keep keeps the head if the classes are the same)'
  source_names, model_names = list(info.class_names), list(class_names)
  if source_names == model_names:
    return np.arange(classes), ''
  if len(set(source_names)) == len(source_names) and sorted(source_names) == sorted(model_names):
    return np.array([source_names.index(name) for name in model_names]), ' (rows reordered by class name)'
  other = next(iter(set(source_names) - set(model_names)), None)
  return None, 'the source has different classes' + (f' (for example {other!r})' if other else '')


def _fresh_reason(source: Source, head: Head) -> str:
  """Returns the reason why the head is initialized instead of kept, or ''."""
  if head == 'fresh':
    return 'init_head=fresh'
  reason = source.info.head_reason
  if not source.info.classes:
    reason = 'the source has no head'
  elif any('pre_logits' in name for name in source.unused):
    reason = 'its head is behind pre_logits'
  if reason and head == 'keep':
    raise UserError(f'the head of {source.info.kind} cannot be kept: {reason}')
  return reason
