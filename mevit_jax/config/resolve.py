"""The one function that changes a config after parsing."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import EXECUTION_FIELDS, Config, differences, to_dict
from mevit_jax.errors import UserError

# Model fields that an evaluation may set differently from training.
_EVALUATION_MAY_CHANGE = (
  'model.classes',
  'model.layer_norm_eps',
  'model.motion_init',
  'model.drop_path',
  'model.dtype',
)
_INIT_FIELDS = ('init_from', 'init_head', 'init_channel_order')


class Dataset(NamedTuple):
  """What a config takes from its dataset."""

  name: str
  class_names: tuple[str, ...]


class Source(NamedTuple):
  """What a config takes from the weights it starts from, or from the checkpoint it evaluates.

  Attributes:
    name: path of the weights, for messages.
    layer_norm_eps: LayerNorm epsilon of the weights.
    normalization: pixel normalization of the weights; None if they do not state it.
    trained: config of a checkpoint or workdir of ours; None for other libraries' weights.
  """

  name: str
  layer_norm_eps: float
  normalization: Normalization | None = None
  trained: Config | None = None


class Change(NamedTuple):
  """One change of a config field.

  Attributes:
    field: full name.
    before: value of the parsed config.
    after: resolved value.
    reason: where the new value comes from.
  """

  field: str
  before: Any
  after: Any
  reason: str

  def __str__(self) -> str:
    return f'config.{self.field}: {self.before} -> {self.after} ({self.reason})'


def resolve(
  config: Config,
  dataset: Dataset | None = None,
  source: Source | None = None,
  devices: int = 1,
  *,
  evaluate: bool = False,
) -> tuple[Config, list[Change]]:
  """Completes a config with what the dataset, the weights and the devices determine.

  Args:
    config: the parsed config.
    dataset: sets `model.classes`.
    source: sets `model.layer_norm_eps`, `data.mean` and `data.std`; a workdir of ours also `init_from`.
    devices: number of shards of the batch; rounds `evaluation.batch_size` up to a multiple.
    evaluate: take the whole model from `source`, a checkpoint, but for its dtype.

  Returns:
    The resolved config, and every change with its reason, for the command to print.

  Raises:
    UserError: the config contradicts the dataset or the checkpoint.
  """
  resolved = config
  reasons: dict[str, str] = {}

  def change(group: str, reason: str, **values: Any) -> None:
    nonlocal resolved
    target = getattr(resolved, group) if group else resolved
    values = {name: value for name, value in values.items() if getattr(target, name) != value}
    reasons.update({f'{group}.{name}' if group else name: reason for name in values})
    changed = dataclasses.replace(target, **values)
    group_values: dict[str, Any] = {group: changed}
    resolved = dataclasses.replace(resolved, **group_values) if group else changed

  if source and source.trained and evaluate:
    _check_same_model(config, source.trained, source.name)
    trained = {field.name: getattr(source.trained.model, field.name) for field in dataclasses.fields(config.model)}
    change('model', f'from the checkpoint in {source.name}', **{**trained, 'dtype': config.model.dtype})
  elif source and source.trained and not config.init_from:
    change('', f'as {source.name} was started', **{name: getattr(source.trained, name) for name in _INIT_FIELDS})
  if source:
    change('model', f'as in {source.name}', layer_norm_eps=source.layer_norm_eps)
  if source and source.normalization:
    mean, std = source.normalization
    change('data', f'normalization of {source.name}', mean=tuple(mean), std=tuple(std))
  if dataset:
    classes, found = resolved.model.classes, len(dataset.class_names)
    if classes not in (0, found):
      raise UserError(f'model.classes is {classes}, but the dataset {dataset.name!r} has {found} classes')
    change('model', f'classes of the dataset {dataset.name}', classes=found)
  if not evaluate:
    change('evaluation', 'training evaluates the latest parameters', checkpoint='last')
  size = -(-config.evaluation.batch_size // devices) * devices
  change('evaluation', f'a multiple of {devices} devices', batch_size=size)
  return resolved, [Change(name, _get(config, name), _get(resolved, name), reason) for name, reason in reasons.items()]


def describe(changes: Sequence[Change]) -> str:
  """Formats changes, one per line."""
  return '\n'.join(map(str, changes))


def _check_same_model(config: Config, trained: Config, name: str) -> None:
  found = differences({'model': to_dict(trained)['model']}, {'model': to_dict(config)['model']})
  found = [line for line in found if not line.startswith((*EXECUTION_FIELDS, *_EVALUATION_MAY_CHANGE))]
  if found:
    raise UserError(f'{name} has a different model (saved -> requested): {"; ".join(found[:5])}')


def _get(config: Config, path: str) -> Any:
  value: Any = config
  for part in path.split('.'):
    value = getattr(value, part)
  return value
