"""The one function that changes a config after parsing."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import EXECUTION_FIELDS, Config, differences, scaled_short_side, to_dict
from mevit_jax.config.model import ENCODER_FIELDS, WEIGHT_FIELDS, MEViTConfig
from mevit_jax.errors import UserError

# Model fields that an evaluation may set differently from training.
_EVALUATION_MAY_CHANGE = (
  'model.classes',
  *(f'model.{name}' for name in WEIGHT_FIELDS),
  'model.motion_init',
  'model.drop_path',
  'model.dtype',
)
_INIT_FIELDS = ('init_from', 'init_weights', 'init_head', 'init_channel_order')


class Dataset(NamedTuple):
  """The dataset, as far as it determines the config.

  Attributes:
    name: name of the dataset.
    class_names: name of each label id.
    normalization: pixel mean and standard deviation of its training videos; None if it does not state them.
  """

  name: str
  class_names: tuple[str, ...]
  normalization: Normalization | None = None


class Source(NamedTuple):
  """The weights that a run starts from or evaluates, as far as they determine the config.

  Attributes:
    name: path of the weights, for messages.
    model: fields of `model` that the weights determine (`WEIGHT_FIELDS`), by name.
    normalization: pixel normalization of the weights; None if they do not state it.
    trained: config of a checkpoint or workdir of ours; None for other libraries' weights.
    init_from: name to record, with the commit of a model on the hub; '' keeps the config's.
    encoder: fields of `model` that an image encoder determines (`ENCODER_FIELDS`), by name, for `model.space_encoder`.
  """

  name: str
  model: Mapping[str, Any]
  normalization: Normalization | None = None
  trained: Config | None = None
  init_from: str = ''
  encoder: Mapping[str, Any] = MappingProxyType({})


def weight_fields(config: MEViTConfig) -> dict[str, Any]:
  """Returns the fields of a model that its weights determine."""
  return {name: getattr(config, name) for name in WEIGHT_FIELDS}


def encoder_fields(config: MEViTConfig) -> dict[str, Any]:
  """Returns the fields of a model that the weights of its space encoder determine; {} without one."""
  return {name: getattr(config, name) for name in ENCODER_FIELDS} if config.space_encoder else {}


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


class _Resolver:
  """A config with its changes so far."""

  def __init__(self, config: Config):
    self._parsed = self.config = config
    self._reasons: dict[str, str] = {}

  def change(self, group: str, reason: str, **values: Any) -> None:
    """Sets fields of a group ('' is the config itself); fields that have the value already do not count as changes."""
    target = getattr(self.config, group) if group else self.config
    values = {name: value for name, value in values.items() if getattr(target, name) != value}
    self._reasons.update({f'{group}.{name}' if group else name: reason for name in values})
    changed: Any = dataclasses.replace(target, **values)
    self.config = dataclasses.replace(self.config, **{group: changed}) if group else changed

  def changes(self) -> list[Change]:
    """Returns all changes with their reasons."""
    return [
      Change(name, _get_field(self._parsed, name), _get_field(self.config, name), reason)
      for name, reason in self._reasons.items()
    ]


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
    dataset: sets `model.classes` and, from scratch, `data.mean` and `data.std` unless they are set.
    source: sets the model's `WEIGHT_FIELDS`, `data.mean` and `data.std`; a workdir of ours or a model of the hub also
      `init_from`.
    devices: number of shards of the batch; rounds `evaluation.batch_size` up to a multiple.
    evaluate: take the whole model from `source`, a checkpoint, except its dtype.

  Returns:
    The resolved config, and every change with its reason, for the command to print.

  Raises:
    UserError: the config contradicts the dataset, the checkpoint or itself.
  """
  resolver = _Resolver(config)
  if source:
    _apply_source(resolver, source, evaluate)
  if dataset:
    classes, expected = resolver.config.model.classes, len(dataset.class_names)
    if classes not in (0, expected):
      raise UserError(f'model.classes is {classes}, but the dataset {dataset.name!r} has {expected} classes')
    resolver.change('model', f'classes of the dataset {dataset.name}', classes=expected)
    _apply_pixels(resolver, dataset)
  if not evaluate:
    _check_repeats(resolver.config)
    resolver.change('evaluation', 'training evaluates the latest parameters', checkpoint='last')
  size = -(-config.evaluation.batch_size // devices) * devices
  resolver.change('evaluation', f'a multiple of {devices} devices', batch_size=size)
  return resolver.config, resolver.changes()


def _apply_source(resolver: _Resolver, source: Source, evaluate: bool) -> None:
  """Applies what the weights determine."""
  config = resolver.config
  if source.trained and evaluate:
    _check_same_model(config, source.trained, source.name)
    trained = {field.name: getattr(source.trained.model, field.name) for field in dataclasses.fields(config.model)}
    reason = f'from the checkpoint in {source.name}'
    resolver.change('model', reason, **{**trained, 'dtype': config.model.dtype})
  elif source.trained and not config.init_from:
    init = {name: getattr(source.trained, name) for name in _INIT_FIELDS}
    resolver.change('', f'the run in {source.name} started from it', **init)
  if source.init_from:
    resolver.change('', 'the commit of its revision', init_from=source.init_from)
  resolver.change('model', f'as in {source.name}', **source.model)
  if config.model.space_encoder:
    resolver.change('model', f'as in {source.name}', **source.encoder)
  if source.normalization:
    mean, std = source.normalization
    resolver.change('data', f'normalization of {source.name}', mean=tuple(mean), std=tuple(std))


def _apply_pixels(resolver: _Resolver, dataset: Dataset) -> None:
  """Fills in the short side and, without pretrained weights, the normalization, unless they are set."""
  config = resolver.config
  if not config.data.short_side:
    size = config.model.image_size
    resolver.change('data', f'for model.image_size {size}', short_side=scaled_short_side(size))
  normalization, reason = Normalization(), 'the weights do not state it'
  if not config.init_from:
    normalization = dataset.normalization or normalization
    reason = (
      f'pixels of the dataset {dataset.name}'
      if dataset.normalization
      else f'the dataset {dataset.name} does not state its own; prepare it again, with --overwrite, if it is to'
    )
  unset = {name: value for name, value in normalization._asdict().items() if not getattr(config.data, name)}
  resolver.change('data', reason, **unset)


def _check_repeats(config: Config) -> None:
  """Raises a UserError if the clips of a repeated video would be equal."""
  repeats, clip = config.data.repeated_augmentation, config.clip
  if repeats > 1 and not config.augment.enabled and clip.short_side == (min(clip.size), min(clip.size)):
    raise UserError(
      f'data.repeated_augmentation {repeats} would repeat the same clip: no augmentation is enabled, and '
      f'data.short_side {clip.short_side} leaves no room to crop {clip.size}; set augment.flip or another, or '
      'data.repeated_augmentation=1'
    )


def describe(changes: Sequence[Change]) -> str:
  """Formats changes, one per line."""
  return '\n'.join(map(str, changes))


def _check_same_model(config: Config, trained: Config, name: str) -> None:
  found = differences({'model': to_dict(trained)['model']}, {'model': to_dict(config)['model']})
  may_change = [*EXECUTION_FIELDS, *_EVALUATION_MAY_CHANGE]
  if config.model.space_encoder:  # not set in the config, but taken from the encoder
    may_change += [f'model.{name}' for name in ENCODER_FIELDS]
  found = [line for line in found if not line.startswith(tuple(may_change))]
  if found:
    raise UserError(f'{name} has a different model (saved -> requested): {"; ".join(found[:5])}')


def _get_field(config: Config, path: str) -> Any:
  """Returns the value of a field by its full name."""
  return functools.reduce(getattr, path.split('.'), config)
