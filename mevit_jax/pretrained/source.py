"""Sources of weights in any known format: their properties, and their arrays by parameter name."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import is_shared
from mevit_jax.config.data import Normalization
from mevit_jax.config.model import usual_heads
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Params, parameter_shapes
from mevit_jax.models.mevit import STAGES
from mevit_jax.pretrained import timesformer, vit
from mevit_jax.pretrained.files import WeightFiles, read_files
from mevit_jax.pretrained.hub import Located, locate
from mevit_jax.pretrained.state_dicts import short_names, training_only_reason
from mevit_jax.pretrained.tensors import LazyTensors
from mevit_jax.pretrained.transforms import CheckpointFormat, ConvertedArrays, detect_format
from mevit_jax.trees import get_by_name

ChannelOrder = Literal['rgb', 'bgr']
FORMATS = (*vit.FORMATS, *timesformer.FORMATS)
# Values that a Hugging Face config must have, where it has the field, for its model to be supported.
_HF_SUPPORTED = {
  'model_type': ('vit', 'timesformer'),
  'hidden_act': ('gelu',),
  'qkv_bias': (True,),
  'attention_type': ('divided_space_time',),
}


@dataclasses.dataclass(frozen=True)
class SourceInfo:
  """Properties of a source; None where the source does not state them.

  Attributes:
    kind: name of the format in messages.
    depth: number of blocks that patch tokens pass through.
    width: token width.
    mlp_dim: hidden width of the feed-forward network.
    patch_size: patch height and width in pixels.
    grid: patches per column and row.
    layer_norm_eps: epsilon of its LayerNorms; the model must have the same.
    antialias: whether its library antialiases when it resizes positions, see `positions.resize_space`.
    heads: number of attention heads.
    frames: number of its time positions; 0 for an image model.
    classes: number of classes of its head; 0 without one.
    class_names: names of these classes.
    normalization: pixel normalization that the model was trained with.
  """

  kind: str
  depth: int
  width: int
  mlp_dim: int
  patch_size: tuple[int, int]
  grid: tuple[int, int]
  layer_norm_eps: float
  antialias: bool = True
  heads: int | None = None
  frames: int = 0
  classes: int = 0
  class_names: tuple[str, ...] | None = None
  normalization: Normalization | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """An open source of weights.

  Attributes:
    info: properties of the source.
    arrays: parameter name (see `transforms.py`) -> array.
    origin: parameter name -> the source's tensor names.
    unused: tensor name that has no counterpart in MEViT -> reason.
    channel_order: channel order of the images that it was trained on.
    name: its path; or its name on the hub, with the commit.
    weights: 'ema' or 'raw' parameters.
  """

  info: SourceInfo
  arrays: Mapping[str, np.ndarray]
  origin: Mapping[str, tuple[str, ...]]
  unused: Mapping[str, str]
  channel_order: ChannelOrder = 'rgb'
  name: str = ''
  weights: Literal['raw', 'ema'] = 'raw'


def open_source(
  source: str | Path | Located,
  heads: int | None = None,
  channel_order: ChannelOrder = 'rgb',
  weights: str = 'auto',
) -> Source:
  """Opens weights of any known format.

  Args:
    source: an .npz, .safetensors or PyTorch file, a folder of Hugging Face or timm, a workdir, a shared model, or the
      name of a model on the hub (`hf://ORG/NAME`).
    heads: number of attention heads, for formats whose shapes do not state it; None is that of its config.json, else
      the usual one of ViTs of this width.
    channel_order: channel order of the training images; `info.normalization` and the loaded parameters are RGB.
    weights: parameters to read, where there are several sets: 'raw', 'ema', or 'auto' (EMA if there is any).

  Raises:
    UserError: the source does not exist, is damaged, has an unknown format, or a name is unknown or missing.
  """
  path, name = source if isinstance(source, Located) else locate(source)
  if (path / 'checkpoints').is_dir() or is_shared(path):
    return dataclasses.replace(_with_channel_order(_open_workdir(path, weights), channel_order), name=name)
  files = read_files(path, weights)
  _check_config(files.config)
  checkpoint_format = detect_format(FORMATS, list(short_names(path, files.tensors, FORMATS)))
  names = short_names(path, files.tensors, (checkpoint_format,))
  training_only = {names[name]: reason for name in names if (reason := training_only_reason(name))}
  tensors = LazyTensors(
    path, {name: partial(files.tensors.__getitem__, full) for name, full in names.items() if full not in training_only}
  )
  width = ConvertedArrays(checkpoint_format, tensors, 1)['norm/scale'].size
  heads = heads or _heads(files.config) or usual_heads(width) or 1
  arrays = ConvertedArrays(checkpoint_format, tensors, heads)
  if arrays.depth == 0:
    raise UserError(f'{path}: {checkpoint_format.name} without any block; the file is damaged or incomplete')
  info = _describe(checkpoint_format, arrays, files, tensors)
  origin = {name: tuple(names[tensor] for tensor in tensors) for name, tensors in arrays.origin.items()}
  unused = {**{names[tensor]: reason for tensor, reason in arrays.unused.items()}, **training_only, **files.unused}
  return _with_channel_order(Source(info, arrays, origin, unused, name=name, weights=files.weights), channel_order)


def _heads(config: dict[str, Any]) -> int | None:
  """Returns the number of attention heads that a config states."""
  heads = config.get('num_attention_heads') or _section(config, 'model_args').get('num_heads')
  if heads is not None and not (isinstance(heads, int) and heads > 0):
    raise UserError(f'config.json of the weights has num_attention_heads = {heads!r:.80}, not a positive integer')
  return heads


def _with_channel_order(source: Source, channel_order: ChannelOrder) -> Source:
  """Returns the source with its normalization in RGB order; `load` reorders the patch embedding."""
  info = source.info
  if channel_order == 'bgr' and info.normalization:
    mean, std = info.normalization
    info = dataclasses.replace(info, normalization=Normalization(mean[::-1], std[::-1]))
  return dataclasses.replace(source, info=info, channel_order=channel_order)


def _describe(
  checkpoint_format: CheckpointFormat, arrays: ConvertedArrays, files: WeightFiles, tensors: LazyTensors
) -> SourceInfo:
  config = files.config
  depth = config.get('num_hidden_layers', arrays.depth)
  if depth != arrays.depth:
    raise UserError(
      f'the weights have {arrays.depth} blocks, but num_hidden_layers of their config.json is {depth}: '
      'the weights are damaged or incomplete'
    )
  patch_size = arrays['embedding/kernel'].shape[:2]
  query = tensors[arrays.origin['blocks/0/space_attention/query/bias'][0]]
  heads = _heads(config) or (query.shape[0] if query.ndim == 2 else None)  # Google's: h k
  return SourceInfo(
    kind=checkpoint_format.name + (f' (EMA parameters {files.key!r})' if files.weights == 'ema' else ''),
    depth=arrays.depth,
    width=arrays['class_token'].size,
    mlp_dim=arrays['blocks/0/mlp/up/bias'].size,
    patch_size=patch_size,
    grid=_grid(arrays['embedding/space'].shape[0], config, patch_size),
    layer_norm_eps=_layer_norm_eps(config) or checkpoint_format.layer_norm_eps,
    antialias=checkpoint_format.antialias,
    heads=heads,
    frames=len(arrays['embedding/time']) if 'embedding/time' in arrays else 0,
    classes=arrays['head/bias'].size if 'head/bias' in arrays else 0,
    class_names=_class_names(config),
    normalization=_normalization(files) or checkpoint_format.normalization,
  )


def _layer_norm_eps(config: dict[str, Any]) -> float | None:
  eps = config.get('layer_norm_eps')
  if eps is not None and not (_is_number(eps) and 0 <= eps < 1):
    raise UserError(f'config.json of the weights has an invalid layer_norm_eps: {eps!r:.80}')
  return eps and float(eps)


def _check_config(config: dict[str, Any]) -> None:
  """Raises a UserError if a Hugging Face config describes a model that is not supported."""
  for name, values in _HF_SUPPORTED.items():
    if config.get(name, values[0]) not in values:
      supported = ' or '.join(map(repr, values))
      raise UserError(f'config.json of the weights has {name} = {config[name]!r}; only {supported} is supported')


def _grid(patches: int, config: dict[str, Any], patch_size: tuple[int, int]) -> tuple[int, int]:
  """Returns the rows and columns of the patches: as the config says, else a square."""
  grid = math.isqrt(patches), math.isqrt(patches)
  image_size = config.get('image_size') or _section(config, 'model_args').get('img_size')
  input_size = _section(config, 'pretrained_cfg').get('input_size')
  if image_size:
    grid = _patches(image_size, patch_size)
  elif isinstance(input_size, list):
    # The default of timm's models of this name; the weights may be of a model that was built for another size.
    default = _patches(input_size[1:], patch_size)
    grid = default if math.prod(default) == patches else grid
  if math.prod(grid) != patches:
    raise UserError(f'the weights have positions of {patches} patches, which is not a {grid[0]}x{grid[1]} grid')
  return grid


def _patches(image_size: Any, patch_size: tuple[int, int]) -> tuple[int, int]:
  """Returns the rows and columns of patches in an image, given the side of a square or height and width."""
  sides = [image_size] * 2 if isinstance(image_size, int) else image_size
  if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
    raise UserError(f'the image size in config.json of the weights is not a height and width: {image_size!r}')
  return sides[0] // patch_size[0], sides[1] // patch_size[1]


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
  """Returns a dict within a config; {} if it is absent, null or not a dict."""
  section = config.get(name)
  return section if isinstance(section, dict) else {}


def _normalization(files: WeightFiles) -> Normalization | None:
  """Returns the pixel normalization in the files that Hugging Face or timm write beside the weights."""
  timm = _section(files.config, 'pretrained_cfg')
  mean = files.preprocessor.get('image_mean', timm.get('mean'))
  std = files.preprocessor.get('image_std', timm.get('std'))
  if not mean or not std:
    return None
  for values, low in ((mean, 0), (std, 1e-6)):
    if not (isinstance(values, list) and len(values) == 3 and all(_is_number(v) and low <= v < 1e6 for v in values)):
      raise UserError(f'the configs of the weights have an invalid pixel mean or standard deviation: {values!r:.80}')
  return Normalization(tuple(map(float, mean)), tuple(map(float, std)))


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _class_names(config: dict[str, Any]) -> tuple[str, ...] | None:
  """Returns the class names in a Hugging Face or timm config; None for placeholders (LABEL_0) or labels without ids."""
  timm = config.get('label_names') or _section(config, 'pretrained_cfg').get('label_names')
  if timm:
    return tuple(timm) if isinstance(timm, list) and all(isinstance(name, str) for name in timm) else None
  labels = _section(config, 'id2label')
  if not all(i.isdecimal() and isinstance(name, str) for i, name in labels.items()):
    return None
  names = tuple(labels[i] for i in sorted(labels, key=int))
  return None if all(name == f'LABEL_{i}' for i, name in enumerate(names)) else names


def _open_workdir(path: Path, weights: str) -> Source:
  """Opens the newest checkpoint of a workdir, or a shared model."""
  checkpoint = load_checkpoint(path, weights=weights)
  arrays, origin = unstack_blocks(jax.tree.map(np.asarray, checkpoint.params))
  config = checkpoint.config.model
  info = SourceInfo(
    kind=f'MEViT of step {checkpoint.step}{" (EMA)" if checkpoint.weights == "ema" else ""}',
    depth=config.space_blocks + config.motion_blocks,
    width=config.width,
    mlp_dim=config.mlp_dim,
    patch_size=config.patch_size,
    grid=config.grid,
    layer_norm_eps=config.layer_norm_eps,
    heads=config.heads,
    frames=config.frames,
    classes=config.classes,
    class_names=checkpoint.class_names,
    normalization=checkpoint.normalization,
  )
  return Source(info, arrays, origin, {}, weights=checkpoint.weights)


def unstack_blocks(params: Params) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
  """Splits the stacked blocks of all stages.

  Returns:
    arrays: name -> array (a view); blocks are numbered consecutively as `blocks/{i}/...`. Class blocks are separate,
      `class_blocks/{i}/...`, because patch tokens do not pass through them.
    origin: the same name -> path of the parameter and the block's index in it.
  """
  arrays: dict[str, np.ndarray] = {}
  origin: dict[str, tuple[str, ...]] = {}
  first_block = dict.fromkeys(STAGES, 0)
  if 'space' in params:
    first_block['motion'] = len(params['space']['blocks']['mlp']['up']['bias'])
  for path in parameter_shapes(params):
    leaf = get_by_name(params, path)
    stage, blocks, rest = path.partition('/blocks/')
    if not blocks:
      arrays[path] = leaf.reshape(-1, leaf.shape[-1]) if path == 'embedding/space' else leaf
      origin[path] = (path,)
      continue
    prefix = 'class_blocks' if stage == STAGES[-1] else 'blocks'
    for i, array in enumerate(leaf):
      name = f'{prefix}/{first_block[stage] + i}/{rest}'
      arrays[name], origin[name] = array, (f'{stage}/blocks[{i}]/{rest}',)
  return arrays, origin
