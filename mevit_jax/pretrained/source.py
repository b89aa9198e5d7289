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
from mevit_jax.config.model import WEIGHT_FIELDS, usual_heads
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Params, parameter_shapes
from mevit_jax.models.mevit import STAGES
from mevit_jax.pretrained import clip, hf_vit, timesformer, timm_vit, vit
from mevit_jax.pretrained.files import WeightFiles, read_files
from mevit_jax.pretrained.formats import CheckpointFormat, ConvertedArrays, detect_format
from mevit_jax.pretrained.hub import Located, locate
from mevit_jax.pretrained.settings import Settings, read_settings, vision_config
from mevit_jax.pretrained.state_dicts import short_names, training_only_reason
from mevit_jax.pretrained.tensors import LazyTensors
from mevit_jax.pretrained.transforms import Sizes
from mevit_jax.trees import get_by_name

ChannelOrder = Literal['rgb', 'bgr']
FORMATS = (*vit.FORMATS, *timm_vit.FORMATS, *hf_vit.FORMATS, *clip.FORMATS, *timesformer.FORMATS)


@dataclasses.dataclass(frozen=True)
class SourceInfo:
  """Properties of a source; None where the source does not state them.

  Attributes:
    kind: name of the format in messages.
    depth: number of blocks that patch tokens pass through.
    width: token width.
    mlp_dim: hidden width of the feed-forward network.
    patch_size: patch height and width in pixels.
    grid: patches per column and row; those of its images, where its positions are rotary.
    layer_norm_eps: epsilon of its LayerNorms; the model must have the same.
    antialias: whether its library antialiases when it resizes positions, see `positions.resize_space`.
    heads: number of attention heads.
    frames: number of its time positions; 0 for an image model.
    classes: number of classes of its head; 0 without one.
    class_names: names of these classes.
    normalization: pixel normalization that the model was trained with.
    tokens: tokens of a frame besides its patches: the class token and registers.
    has_class_token: whether a class token is the first of these.
    activation: activation of its MLPs.
    pre_norm: whether a LayerNorm follows its embedding.
    rotary_theta: base of its rotary positions; 0 without them.
    head_reason: reason why its head is initialized instead of kept; '' if it can be kept.
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
  tokens: int = 1
  has_class_token: bool = True
  activation: str = 'gelu'
  pre_norm: bool = False
  rotary_theta: float = 0.0
  head_reason: str = ''

  @property
  def model_fields(self) -> dict[str, Any]:
    """Fields of `MEViTConfig` that these weights determine."""
    return {name: getattr(self, name) for name in WEIGHT_FIELDS}

  @property
  def encoder_fields(self) -> dict[str, Any]:
    """Fields of `MEViTConfig` that these weights determine as its space encoder; {} unless this is an image model."""
    if self.frames:
      return {}
    heads = self.heads or usual_heads(self.width)
    if heads is None:
      raise UserError(f'{self.kind} does not state its number of attention heads: put its config.json beside it')
    sizes = {name: getattr(self, name) for name in ('width', 'mlp_dim', 'patch_size')}
    return {**sizes, 'heads': heads, 'space_blocks': self.depth, 'frame_tokens': self.tokens}


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
  settings = read_settings(files.config)
  checkpoint_format = detect_format(FORMATS, list(short_names(path, files.tensors, FORMATS)))
  names = short_names(path, files.tensors, (checkpoint_format,))
  training_only = {names[name]: reason for name in names if (reason := training_only_reason(name))}
  tensors = LazyTensors(
    path, {name: partial(files.tensors.__getitem__, full) for name, full in names.items() if full not in training_only}
  )
  arrays = ConvertedArrays(checkpoint_format, tensors, Sizes(heads or 1))
  if arrays.depth == 0:
    raise UserError(f'{path}: {checkpoint_format.name} without any block; the file is incomplete')
  if heads is None:
    heads = settings.heads or usual_heads(arrays['blocks/0/mlp/norm/scale'].size) or 1
    arrays.sizes = arrays.sizes._replace(heads=heads)
  info = _describe(checkpoint_format, arrays, files, settings, tensors)
  origin = {name: tuple(names[tensor] for tensor in tensors) for name, tensors in arrays.origin.items()}
  unused = {**{names[tensor]: reason for tensor, reason in arrays.unused.items()}, **training_only, **files.unused}
  return _with_channel_order(Source(info, arrays, origin, unused, name=name, weights=files.weights), channel_order)


def _with_channel_order(source: Source, channel_order: ChannelOrder) -> Source:
  """Returns the source with its normalization in RGB order; `load` reorders the patch embedding."""
  info = source.info
  if channel_order == 'bgr' and info.normalization:
    mean, std = info.normalization
    info = dataclasses.replace(info, normalization=Normalization(mean[::-1], std[::-1]))
  return dataclasses.replace(source, info=info, channel_order=channel_order)


def _describe(
  checkpoint_format: CheckpointFormat,
  arrays: ConvertedArrays,
  files: WeightFiles,
  settings: Settings,
  tensors: LazyTensors,
) -> SourceInfo:
  config = vision_config(files.config)
  depth = config.get('num_hidden_layers', arrays.depth)
  if depth != arrays.depth:
    raise UserError(
      f'the weights have {arrays.depth} blocks, but num_hidden_layers of their config.json is {depth}: '
      'the weights are incomplete, or the config belongs to others'
    )
  patch_size = arrays['embedding/kernel'].shape[:2]
  arrays.sizes = arrays.sizes._replace(patches=math.prod(_stated_grid(config, patch_size) or ()) or None)
  query = tensors[arrays.origin['blocks/0/space_attention/query/kernel'][0]]
  if arrays['blocks/0/mlp/up/bias'].size == 2 * arrays['blocks/0/mlp/down/kernel'].shape[0]:
    name = arrays.origin['blocks/0/mlp/up/bias'][0]
    raise UserError(f'{checkpoint_format.name} with SwiGLU ({name!r} has two halves), which MEViT does not have')
  classes = arrays['head/bias'].size if 'head/bias' in arrays else 0
  has_class_token = _has_class_token(checkpoint_format, arrays)
  return SourceInfo(
    kind=checkpoint_format.name + (f' (EMA parameters {files.key!r})' if files.weights == 'ema' else ''),
    depth=arrays.depth,
    width=arrays['blocks/0/mlp/norm/scale'].size,
    mlp_dim=arrays['blocks/0/mlp/up/bias'].size,
    patch_size=patch_size,
    grid=_grid(checkpoint_format, arrays, config, settings),
    layer_norm_eps=settings.layer_norm_eps or checkpoint_format.layer_norm_eps,
    antialias=checkpoint_format.antialias,
    heads=query.shape[1] if query.ndim == 3 else settings.heads,  # Google's: d h k
    frames=len(arrays['embedding/time']) if 'embedding/time' in arrays else 0,
    classes=classes,
    class_names=_class_names(files.config),
    normalization=_normalization(files) or checkpoint_format.normalization,
    tokens=has_class_token + (len(arrays['registers']) if 'registers' in arrays else 0),
    has_class_token=has_class_token,
    activation=_activation(checkpoint_format, settings, pre_norm='pre_norm/scale' in arrays),
    pre_norm='pre_norm/scale' in arrays,
    rotary_theta=settings.rotary_theta,
    head_reason=(settings.head_reason or checkpoint_format.head_reason) if classes else '',
  )


def _has_class_token(checkpoint_format: CheckpointFormat, arrays: ConvertedArrays) -> bool:
  """Returns whether a class token takes part in the attention; an attention pool's query does not."""
  if 'class_token' in arrays and not any(name.startswith('class_blocks/') for name in arrays):
    return True
  if 'class_position' in arrays and np.any(arrays['class_position']):
    raise UserError(
      f'{checkpoint_format.name}: {arrays.origin["class_position"][-1]} has a position of a class token, which is '
      'missing: the file is incomplete'
    )
  return False


def _activation(checkpoint_format: CheckpointFormat, settings: Settings, *, pre_norm: bool) -> str:
  """Returns the activation; of encoders with a pre-norm (CLIP), some have QuickGELU, which no tensor shows."""
  activation = settings.activation or (None if pre_norm else checkpoint_format.activation)
  if activation is None:
    raise UserError(
      f'the tensors of {checkpoint_format.name} do not show its activation: put its config.json (of OpenCLIP: '
      'open_clip_config.json, as config.json) beside them'
    )
  return activation


def _grid(
  checkpoint_format: CheckpointFormat, arrays: ConvertedArrays, config: dict[str, Any], settings: Settings
) -> tuple[int, int]:
  """Returns the rows and columns of the patches: as the config says, else a square."""
  stated = _stated_grid(config, arrays['embedding/kernel'].shape[:2])
  if 'embedding/space' not in arrays:
    if not settings.rotary_theta:
      raise UserError(
        f'{checkpoint_format.name} has no learned positions, and its rotary positions have no tensors: put its '
        'config.json beside them'
      )
    return stated or (0, 0)
  patches = arrays['embedding/space'].shape[0]
  grid = math.isqrt(patches), math.isqrt(patches)
  # timm's input_size is the default of the architecture; the weights may be of a model built for another size.
  is_default = not (config.get('image_size') or _section(config, 'model_args').get('img_size'))
  if stated and not (is_default and math.prod(stated) != patches):
    grid = stated
  if math.prod(grid) != patches:
    raise UserError(f'the weights have positions of {patches} patches, which is not a {grid[0]}x{grid[1]} grid')
  return grid


def _stated_grid(config: dict[str, Any], patch_size: tuple[int, int]) -> tuple[int, int] | None:
  """Returns the rows and columns of the patches of a config's images."""
  image_size = config.get('image_size') or _section(config, 'model_args').get('img_size')
  input_size = _section(config, 'pretrained_cfg').get('input_size')
  if not image_size and isinstance(input_size, list):
    image_size = input_size[1:]
  return _patches(image_size, patch_size) if image_size else None


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
    heads=config.heads,
    frames=config.frames,
    classes=config.classes,
    class_names=checkpoint.class_names,
    normalization=checkpoint.normalization,
    tokens=config.frame_tokens or 1,
    **{name: getattr(config, name) for name in WEIGHT_FIELDS},
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
