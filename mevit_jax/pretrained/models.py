"""Models to use as they are: workdirs, shared models, and classifiers of other libraries that name their classes."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from mevit_jax.checkpoint.reader import Checkpoint, DatasetInfo, load_checkpoint
from mevit_jax.checkpoint.workdir import FORMAT, is_shared
from mevit_jax.config.data import DataConfig
from mevit_jax.config.evaluation import EvaluationConfig
from mevit_jax.config.experiment import Config, to_dict
from mevit_jax.config.model import MEViTConfig, usual_heads
from mevit_jax.errors import UserError
from mevit_jax.models.functional import build_model
from mevit_jax.pretrained.files import has_weights
from mevit_jax.pretrained.hub import is_hub_name, locate
from mevit_jax.pretrained.load import Loaded, load
from mevit_jax.pretrained.source import Source, SourceInfo, open_source

_log = logging.getLogger(__name__)

# Frames of a video that an image classifier sees, each alone; their probabilities are averaged.
_IMAGE_CLIPS = 8
# Strides of TimeSformer's published models by number of frames (Bertasius et al. 2021, section 4); others span as much.
_STRIDES = {8: 32, 16: 16, 96: 4}


def open_model(name: str | Path, step: str = 'last', weights: str = 'auto') -> Checkpoint:
  """Opens a model that has a head and class names; no dataset is needed.

  Args:
    name: workdir, shared model, weights of another library, or the name of a model on the hub (`hf://ORG/NAME`).
    step: checkpoint of a workdir: 'last', 'best' or a step.
    weights: 'ema', 'raw', or 'auto': EMA parameters if there are any.

  Raises:
    UserError: no such model, it is damaged or not supported, or its classes have no names.
  """
  if not is_hub_name(name) and not Path(name).expanduser().exists():
    raise UserError(f'{name} is not a workdir or another model: no such file or folder')
  located = locate(name)
  if _is_ours(located.path):
    return load_checkpoint(located.path, step, weights)
  if located.path.is_dir() and not has_weights(located.path):
    raise UserError(f'{name} is not a workdir or another model: it has neither checkpoints nor weights')
  if step != 'last':
    raise UserError(f'{name} has no checkpoints by step: leave out --checkpoint={step}')
  checkpoint, loaded = convert_model(open_source(located, weights=weights))
  _log.info('%s: %s', located.name, loaded.info.kind)
  return checkpoint


def convert_model(source: Source, config: Config | None = None) -> tuple[Checkpoint, Loaded]:
  """Converts a classifier with its own classes.

  Args:
    source: weights of another library whose head names its classes.
    config: config of the converted model; None is the source's own model.

  Returns:
    The model as a checkpoint of step 0, and the parameters with the origin of each.

  Raises:
    UserError: the source has no head, its classes have no names, or it does not fit the config.
  """
  info = source.info
  if not info.classes:
    raise UserError(f'{source.name} has no classification head: train one with --config.init_from={source.name}')
  if info.class_names is None or len(info.class_names) != info.classes:
    raise UserError(
      f'{source.name} does not name its {info.classes} classes: convert it with the config of a prepared dataset that '
      'has these classes (mevit convert, --config.init_head=keep)'
    )
  config = _with_source(config or _own_config(source), source)
  loaded = load(source, build_model(config.model), class_names=info.class_names, head='keep')
  metadata = {
    'config': to_dict(config),
    'class_names': list(info.class_names),
    'fingerprint': '',
    'videos': {},
    'format': FORMAT,
  }
  checkpoint = Checkpoint(
    folder=Path(source.name),
    config=config,
    class_names=info.class_names,
    dataset=DatasetInfo('', ''),
    step=0,
    weights=source.weights,
    metadata=metadata,
    converted=loaded.params,
  )
  return checkpoint, loaded


def _is_ours(path: Path) -> bool:
  """Returns whether a path is a workdir (also one without checkpoints yet) or a shared model."""
  is_new = (path / 'config.json').is_file() and not has_weights(path)
  return (path / 'checkpoints').is_dir() or is_shared(path) or (path.is_dir() and is_new)


def _with_source(config: Config, source: Source) -> Config:
  """Returns the config with what the source determines."""
  info = source.info
  mean, std = info.normalization or config.data.normalization
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, classes=info.classes, **info.model_fields),
    data=dataclasses.replace(config.data, dataset='', mean=mean, std=std),
    init_from=source.name,
    init_head='keep',
  )


def _own_config(source: Source) -> Config:
  """Returns the config with which a model of another library computes what it computes there."""
  info = source.info
  model = MEViTConfig(**_model_fields(info, source.name))
  side = min(model.image_size)
  data: dict[str, Any] = {'short_side': (side, side), 'sampling': 'uniform'}
  evaluation = EvaluationConfig(clips=_IMAGE_CLIPS, crops=1)
  if info.frames:
    # Configs do not state the sampling: TimeSformer's models of Something-Something saw uniform frames, others dense.
    is_uniform = any('something' in name.lower() for name in info.class_names or ())
    data['sampling'] = 'uniform' if is_uniform else 'dense'
    data['stride'] = _STRIDES.get(info.frames, max(1, 256 // info.frames))
    evaluation = EvaluationConfig()
  return Config(model=model, data=DataConfig(**data), evaluation=evaluation)


def _model_fields(info: SourceInfo, name: str) -> dict[str, Any]:
  """Returns the fields of the model config of an image classifier (one frame), or of a TimeSformer."""
  if info.tokens != 1 or not info.has_class_token:
    raise UserError(f'{name} has registers or no class token: train a head on it with --config.init_from={name}')
  heads = info.heads or usual_heads(info.width)
  if heads is None:
    raise UserError(f'{name} does not state its number of attention heads: convert it with --config (model.heads)')
  rows, columns = info.grid
  height, width = info.patch_size
  blocks = {'space_blocks': info.depth, 'motion_blocks': 0}
  if info.frames:
    blocks = {'space_blocks': 0, 'motion_blocks': info.depth}
  return {
    **blocks,
    'class_blocks': 0,
    'block_size': 1,
    'attention_order': 'time_space',
    'class_token_in_motion': False,
    'frames': info.frames or 1,
    'image_size': (rows * height, columns * width),
    'patch_size': info.patch_size,
    'width': info.width,
    'heads': heads,
    'mlp_dim': info.mlp_dim,
    'dtype': 'float32',
    **info.model_fields,
  }
