"""The config of an experiment: all groups, from and to plain dicts."""

import dataclasses
import difflib
import math
import typing
from typing import Any, ClassVar, Literal

from mevit_jax.config.augment import AugmentConfig
from mevit_jax.config.data import ClipConfig, DataConfig
from mevit_jax.config.evaluation import EvaluationConfig
from mevit_jax.config.mesh import MeshConfig
from mevit_jax.config.model import MEViTConfig
from mevit_jax.config.optimizer import OptimizerConfig
from mevit_jax.config.training import TrainingConfig
from mevit_jax.config.validation import Validated
from mevit_jax.errors import UserError

# Model fields that change how a model is computed, but not the function that it computes.
EXECUTION_FIELDS = ('model.attention', 'model.unroll', 'model.remat')


@dataclasses.dataclass(frozen=True)
class Config(Validated):
  """An experiment: everything that `--config` sets, validated.

  Attributes:
    init_from: pretrained weights: an image ViT, a TimeSformer, or another workdir, by their path or their name on the
      Hugging Face Hub (hf://ORG/NAME[@REVISION] or timm/NAME; the commit is recorded); '' trains from scratch.
      LayerNorm's epsilon and the pixel normalization are then taken from the source if it states them.
    init_weights: 'raw' or 'ema' parameters of the source; 'auto' is EMA (or the teacher) if it has any.
    init_head: 'auto' keeps the source's head if it names the same classes, 'keep' takes it unchecked, 'fresh' replaces
      it.
    init_channel_order: channel order that the source was trained on, 'rgb' or 'bgr'.
  """

  group: ClassVar[str] = ''
  model: MEViTConfig = MEViTConfig()
  data: DataConfig = DataConfig()
  augment: AugmentConfig = AugmentConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  training: TrainingConfig = TrainingConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  mesh: MeshConfig = MeshConfig()
  init_from: str = ''
  init_weights: Literal['auto', 'raw', 'ema'] = 'auto'
  init_head: Literal['auto', 'keep', 'fresh'] = 'auto'
  init_channel_order: Literal['rgb', 'bgr'] = 'rgb'

  def __post_init__(self) -> None:
    super().__post_init__()
    _ = self.clip  # validates data.short_side against model.image_size
    if self.training.cache_features and not self.model.space_encoder:
      raise UserError(
        '`training.cache_features` needs `model.space_encoder`: the features of other models depend on what is trained'
      )

  @property
  def clip(self) -> ClipConfig:
    """Frames and crop of a clip."""
    short_side = self.data.short_side or scaled_short_side(self.model.image_size)
    return ClipConfig(
      frames=self.model.frames,
      size=self.model.image_size,
      sampling=self.data.sampling,
      stride=self.data.stride,
      short_side=(short_side[0], short_side[-1]),
    )


def scaled_short_side(image_size: tuple[int, ...]) -> tuple[int, int]:
  """Returns the range of short sides for a crop of this size, in proportion to 256 to 320 pixels for 224."""
  side = min(image_size)
  return round(side * 256 / 224), round(side * 320 / 224)


def from_dict(values: dict[str, Any]) -> Config:
  """Builds a config from nested dicts, as JSON or a config file holds them.

  Raises:
    UserError: an unknown field (the nearest one is named), a wrong type, or a value out of range.
  """
  return _build(Config, values, '')


def to_dict(config: Config) -> dict[str, Any]:
  """Converts a config to nested dicts that JSON can hold."""
  return dataclasses.asdict(config)


def differences(one: dict, other: dict, path: str = '') -> list[str]:
  """Lists the differences of two nested dicts: 'model.block_size: 2 -> 3'."""
  found = []
  for name in sorted({*one, *other}):
    a, b = one.get(name), other.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      found += differences(a, b, f'{path}{name}.')
    elif _as_json(a) != _as_json(b):
      found.append(f'{path}{name}: {a} -> {b}')
  return found


def _build(cls: Any, values: dict[str, Any], path: str) -> Any:
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
      hint = f'the nearest is {path}{nearest[0]}' if nearest else f'the fields are {", ".join(fields)}'
      raise UserError(f'the config has no field {path}{name}; {hint}')
  types = typing.get_type_hints(cls)
  return cls(**{name: _convert(types[name], value, f'{path}{name}') for name, value in values.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
  """Converts a value to the field's type: JSON has lists for tuples, flags have 1 for 1.0."""
  if dataclasses.is_dataclass(kind):
    return _build(kind, dict(value), f'{path}.')
  if typing.get_origin(kind) is tuple:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_convert(typing.get_args(kind)[0], item, path) for item in items)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'{path} must be a finite number, not {value}')
  if isinstance(kind, type) and type(value) is not kind:
    raise UserError(f'{path} must be of type {kind.__name__}, not {value!r}')
  return value


def _as_json(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
