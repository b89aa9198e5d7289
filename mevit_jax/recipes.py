"""A config file and its flags become frozen dataclasses: the one door between ml_collections and the rest."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from typing import Any, Literal

import ml_collections
from absl import flags
from ml_collections import config_flags

from mevit_jax.data.clips import ClipConfig
from mevit_jax.errors import UserError
from mevit_jax.evaluation.protocol import EvaluationConfig
from mevit_jax.models.config import MEViTConfig
from mevit_jax.parallel.mesh import MeshConfig
from mevit_jax.training.augment import AugmentConfig
from mevit_jax.training.optimizer import OptimizerConfig

# What changes how a model is computed, and not what.
SAME_FUNCTION = ('model.attention', 'model.unroll', 'model.remat')

# The flag --config counts as the command's own: its --help shows it.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which videos, and which frames of them.

  Attributes:
    dataset: the name it was prepared under.
    data_dir: the folder that holds prepared datasets.
    train_split: the split to train on.
    sampling: 'dense' (frames `stride` apart) or 'uniform' (one frame of each of as many equal segments).
    stride: frames between two frames of a clip at 30 frames a second of the video's own clock (dense).
    short_side: training resizes a video's short side to a random length in this range (pixels), then crops at random.
    repeats: clips that a video gives when it is drawn: it is decoded once, and each is another crop of the same frames,
      augmented in another way. An epoch still draws every video once, and so has this many times the steps.
    balance: 0 draws every video once an epoch, 1 every class equally often; between, a class is drawn as often as its
      number of videos to the power of 1 - balance. For small datasets whose classes are uneven.
    mean: of the pixels in [0, 1], by channel; what the weights that training starts from were trained with.
    std: likewise.
    workers: processes that decode; 0 decodes in threads of this process.
  """

  dataset: str = ''
  data_dir: str = 'data'
  train_split: str = 'train'
  sampling: Literal['dense', 'uniform'] = 'dense'
  stride: int = 32
  short_side: tuple[int, ...] = (256, 320)
  repeats: int = 1
  balance: float = 0.0
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  workers: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How long, how much at once, and how often to save and look.

  Attributes:
    epochs: passes over the training split.
    batch_size: examples of a step over all devices and hosts.
    accumulate: parts that a batch is split into, one after the other: 1/k of the memory, the same update.
    label_smoothing: share of a label that is spread over all classes.
    seed: of initialisation, shuffling, crops and all other randomness.
    log_every: steps between two lines of progress.
    save_every: steps between two checkpoints; the last step is always saved.
    keep: how many of the newest checkpoints stay.
    keep_best: whether the checkpoint of the best top-1 stays too, of the evaluations while it trains.
    ema: decay of the parameters' running mean, which then is what is evaluated (ConvNeXt has 0.9999); 0 is none.
    on_nonfinite: where loss or gradient are not finite the update is dropped; then 'stop', or 'skip' and go on.
    evaluate_every: steps between two evaluations, each with a checkpoint; 0 evaluates at the end only.
    profile: first and last step to profile into WORKDIR/profile (TensorBoard, Perfetto); () does not.
  """

  epochs: float = 15.0
  batch_size: int = 64
  accumulate: int = 1
  label_smoothing: float = 0.0
  seed: int = 0
  log_every: int = 20
  save_every: int = 1000
  keep: int = 2
  keep_best: bool = True
  ema: float = 0.0
  on_nonfinite: Literal['stop', 'skip'] = 'stop'
  evaluate_every: int = 0
  profile: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All of a run: what `--config` gives, checked.

  Attributes:
    init_from: weights to start from: an ImageNet ViT's, a TimeSformer's, or another workdir; '' starts from scratch.
      LayerNorm's eps and the pixels' mean and std then are the source's, where it says them.
    init_head: 'auto' keeps the source's head where it names the same classes, 'keep' takes it as it is, 'fresh' not.
    init_channel_order: of the pixels that the source was trained on, 'rgb' or 'bgr'.
  """

  model: MEViTConfig = MEViTConfig()
  data: DataConfig = DataConfig()
  augment: AugmentConfig = AugmentConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  training: TrainingConfig = TrainingConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  mesh: MeshConfig = MeshConfig()
  init_from: str = ''
  init_head: Literal['auto', 'keep', 'fresh'] = 'auto'
  init_channel_order: Literal['rgb', 'bgr'] = 'rgb'

  def __post_init__(self):
    training = self.training
    _positive(training, 'training', ('epochs', 'batch_size', 'accumulate', 'log_every', 'save_every', 'keep'))
    for path, value in (
      ('training.seed', training.seed),
      ('training.evaluate_every', training.evaluate_every),
      ('data.workers', self.data.workers),
    ):
      if value < 0:
        raise UserError(f'{path} must not be negative, and is {value}')
    if training.batch_size % training.accumulate:
      raise UserError(
        f'training.batch_size {training.batch_size} is no multiple of training.accumulate {training.accumulate}'
      )
    if not 0 <= training.label_smoothing < 1:
      raise UserError(f'training.label_smoothing must be in [0, 1), not {training.label_smoothing}')
    if not 0 <= training.ema < 1:
      raise UserError(f'training.ema must be in [0, 1), not {training.ema}')
    if training.on_nonfinite not in ('stop', 'skip'):
      raise UserError(f"training.on_nonfinite must be 'stop' or 'skip', not {training.on_nonfinite!r}")
    for name in ('init_head', 'init_channel_order'):
      choices = typing.get_args(type(self).__annotations__[name])
      if getattr(self, name) not in choices:
        raise UserError(f'{name} must be one of {list(choices)}, not {getattr(self, name)!r}')
    if training.profile and not (len(training.profile) == 2 and 1 <= training.profile[0] <= training.profile[1]):
      raise UserError(f'training.profile is a first and a last step, from 1 on, not {training.profile}')
    if len(self.data.mean) != 3 or len(self.data.std) != 3 or min(self.data.std) <= 0:
      raise UserError('data.mean and data.std are three numbers each, and std is positive')
    self.clip  # noqa: B018 (checks itself)

  @property
  def clip(self) -> ClipConfig:
    """Which frames and which crop a clip is."""
    short_side = self.data.short_side
    if not short_side:
      raise UserError('data.short_side must be one or two numbers of pixels')
    return ClipConfig(
      frames=self.model.frames,
      size=self.model.image_size,
      sampling=self.data.sampling,
      stride=self.data.stride,
      short_side=(short_side[0], short_side[-1]),
    )


def default_config() -> ml_collections.ConfigDict:
  """All fields with their defaults, for config files to change; a name that is not here is an error there."""
  return ml_collections.ConfigDict(dataclasses.asdict(Recipe())).lock()


def config_flag():
  """The flag --config, of every command that takes a recipe."""
  return config_flags.DEFINE_config_file('config', None, 'The recipe: a file of configs/, or your own.')


def recipe_of(config: ml_collections.ConfigDict | dict) -> Recipe:
  """The recipe of a config; a UserError names an unknown field and the nearest one."""
  if not isinstance(config, dict) and not hasattr(config, 'to_dict'):
    raise UserError(f'get_config() of a config file returns what default_config() gave it, not {config!r}')
  return _build(Recipe, config if isinstance(config, dict) else config.to_dict(), '')


def to_dict(recipe: Recipe) -> dict:
  """The recipe as what JSON can hold."""
  return dataclasses.asdict(recipe)


def with_classes(recipe: Recipe, class_names: Sequence[str]) -> Recipe:
  """The recipe with as many classes as the dataset has."""
  classes, found = recipe.model.classes, len(class_names)
  if classes not in (0, found):
    raise UserError(f'model.classes is {classes}, but the dataset {recipe.data.dataset!r} has {found}')
  return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, classes=found))


def with_source(recipe: Recipe, layer_norm_eps: float, mean: Sequence[float], std: Sequence[float]) -> Recipe:
  """The recipe with what the weights that training starts from were trained with."""
  return dataclasses.replace(
    recipe,
    model=dataclasses.replace(recipe.model, layer_norm_eps=layer_norm_eps),
    data=dataclasses.replace(recipe.data, mean=tuple(mean), std=tuple(std)),
  )


def differences(one: dict, other: dict, path: str = '') -> list[str]:
  """Where two recipes, as dicts, differ: 'model.block_size: 2, and 3'."""
  found = []
  for name in sorted({*one, *other}):
    a, b = one.get(name), other.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      found += differences(a, b, f'{path}{name}.')
    elif _plain(a) != _plain(b):
      found.append(f'{path}{name}: {a}, and {b}')
  return found


def _build(cls, values: dict[str, Any], path: str):
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
      hint = f'the nearest is {path}{nearest[0]}' if nearest else f'there are {", ".join(fields)}'
      raise UserError(f'the config has no field {path}{name}; {hint}')
  return cls(**{name: _convert(fields[name].type, value, f'{path}{name}') for name, value in values.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
  """The value as the field's type has it: JSON has lists for tuples, flags have 1 for 1.0."""
  if dataclasses.is_dataclass(kind):
    return _build(kind, dict(value), f'{path}.')
  if typing.get_origin(kind) is tuple:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_convert(typing.get_args(kind)[0], item, path) for item in items)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'{path} must be a number, not {value}')
  if isinstance(kind, type) and type(value) is not kind:
    raise UserError(f'{path} must be {kind.__name__}, not {value!r}')
  return value


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def _positive(config, path: str, names: tuple[str, ...]) -> None:
  for name in names:
    if getattr(config, name) <= 0:
      raise UserError(f'{path}.{name} must be positive, not {getattr(config, name)}')
