"""A source of weights, whatever its kind: what it is, and its arrays under our names."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.checkpoint.workdir import is_shared
from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Params, parameter_shapes
from mevit_jax.pretrained import timesformer, vit
from mevit_jax.pretrained.files import Files, read
from mevit_jax.pretrained.transforms import CheckpointFormat, Mapped, choose

ChannelOrder = Literal['rgb', 'bgr']
PAGES = (*vit.PAGES, *timesformer.PAGES)
# What Hugging Face's configs must say for their model to be ours, where they say it.
_HF_NEEDS = {
  'model_type': ('vit', 'timesformer'),
  'hidden_act': ('gelu',),
  'qkv_bias': (True,),
  'attention_type': ('divided_space_time',),
}


@dataclasses.dataclass(frozen=True)
class SourceInfo:
  """What a source says of itself; None is what it does not say.

  Attributes:
    kind: for people.
    depth: blocks that patches go through.
    width: of a token.
    mlp_dim: hidden width of the feed-forward network.
    patch_size: in pixels.
    grid: patches down and across.
    layer_norm_eps: of its LayerNorms: the model must be built with it.
    antialias: how its library resizes positions, see `positions.resize_space`.
    heads: of every attention.
    frames: of its time positions; 0 where it is a model of images.
    classes: of its head; 0 without one.
    class_names: of them.
    normalization: pixel mean and standard deviation that the model was trained with.
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
  """A source under our names (see `rules.py`): `origin` has theirs for each, `unused` those without one of ours."""

  info: SourceInfo
  arrays: Mapping[str, np.ndarray]
  origin: Mapping[str, tuple[str, ...]]
  unused: Mapping[str, str]
  channel_order: ChannelOrder = 'rgb'


def open_source(path: str | Path, heads: int = 1, channel_order: ChannelOrder = 'rgb') -> Source:
  """Opens weights of any known format.

  Args:
    path: an .npz, .safetensors or PyTorch file, a folder of Hugging Face or timm, or a workdir.
    heads: number of attention heads, for formats whose shapes do not state it.
    channel_order: channel order of the training images; `info.normalization` and the loaded parameters are RGB.

  Raises:
    UserError: damaged, of an unknown kind, or with a name that is unknown or missing.
  """
  path = Path(path).expanduser()
  if not path.exists():
    raise UserError(f'there are no weights at {path}')
  if (path / 'checkpoints').is_dir() or is_shared(path):
    return _open_workdir(path)
  files = read(path)
  _check_config(files.config)
  page = choose(PAGES, list(files.tensors))
  arrays = Mapped(page, files.tensors, heads)
  if arrays.depth == 0:
    raise UserError(f'{path}: {page.name} without a block')
  info = _describe(page, arrays, files)
  if channel_order == 'bgr' and info.normalization:
    mean, std = info.normalization
    info = dataclasses.replace(info, normalization=Normalization(mean[::-1], std[::-1]))
  return Source(info, arrays, arrays.origin, arrays.unused, channel_order)


def _describe(page: CheckpointFormat, arrays: Mapped, files: Files) -> SourceInfo:
  config = files.config
  if config.get('num_hidden_layers', arrays.depth) != arrays.depth:
    raise UserError(
      f'config.json of the weights says {config["num_hidden_layers"]} blocks, and {arrays.depth} are there: '
      'the weights are damaged or incomplete'
    )
  patch_size = arrays['embedding/kernel'].shape[:2]
  query = files.tensors[arrays.origin['blocks/0/space_attention/query/bias'][0]]
  heads = config.get('num_attention_heads') or (query.shape[0] if query.ndim == 2 else None)  # Google's: h k
  pixels = _pixels(files) or page.pixels
  return SourceInfo(
    kind=page.name,
    depth=arrays.depth,
    width=arrays['class_token'].size,
    mlp_dim=arrays['blocks/0/mlp/up/bias'].size,
    patch_size=patch_size,
    grid=_grid(arrays['embedding/space'].shape[0], config, patch_size),
    layer_norm_eps=float(config.get('layer_norm_eps') or page.layer_norm_eps),
    antialias=page.antialias,
    heads=heads,
    frames=len(arrays['embedding/time']) if 'embedding/time' in arrays else 0,
    classes=arrays['head/bias'].size if 'head/bias' in arrays else 0,
    class_names=_class_names(config),
    normalization=pixels,
  )


def _check_config(config: dict[str, Any]) -> None:
  """Refuses what Hugging Face's config says of a model that is not ours."""
  for name, values in _HF_NEEDS.items():
    if config.get(name, values[0]) not in values:
      wanted = ' or '.join(map(repr, values))
      raise UserError(f'config.json of the weights says {name} = {config[name]!r}; only {wanted} is known here')


def _grid(patches: int, config: dict[str, Any], patch_size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of so many patches: as the config says, else a square."""
  grid = math.isqrt(patches), math.isqrt(patches)
  image_size = config.get('image_size') or _part(config, 'model_args').get('img_size')
  pixels = _part(config, 'pretrained_cfg').get('input_size')
  if image_size:
    grid = _patches(image_size, patch_size)
  elif isinstance(pixels, list):
    # What timm's models of this name take by default: these weights may be of one that was built for another size.
    theirs = _patches(pixels[1:], patch_size)
    grid = theirs if math.prod(theirs) == patches else grid
  if math.prod(grid) != patches:
    raise UserError(f'the weights have positions of {patches} patches, which is no {grid[0]}x{grid[1]} grid')
  return grid


def _patches(image_size: Any, patch_size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of patches in an image: of one side (a square), or of its height and width."""
  sides = [image_size] * 2 if isinstance(image_size, int) else image_size
  if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
    raise UserError(f'config.json of the weights has an image size that is no height and width: {image_size!r}')
  return sides[0] // patch_size[0], sides[1] // patch_size[1]


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
  """A dict within a config; what is null there, or no dict, says nothing."""
  part = config.get(name)
  return part if isinstance(part, dict) else {}


def _pixels(files: Files) -> Normalization | None:
  """Mean and standard deviation, where Hugging Face or timm have written them beside the weights."""
  timm = _part(files.config, 'pretrained_cfg')
  mean = files.preprocessor.get('image_mean', timm.get('mean'))
  std = files.preprocessor.get('image_std', timm.get('std'))
  return Normalization(tuple(map(float, mean)), tuple(map(float, std))) if mean and std else None


def _class_names(config: dict[str, Any]) -> tuple[str, ...] | None:
  """Names of the classes in Hugging Face's or timm's config; HF's placeholders are none, nor is what has no numbers."""
  timm = config.get('label_names') or _part(config, 'pretrained_cfg').get('label_names')
  if timm:
    return tuple(timm)
  labels = _part(config, 'id2label')
  if not all(i.isdecimal() for i in labels):
    return None
  names = tuple(labels[i] for i in sorted(labels, key=int))
  return None if all(name == f'LABEL_{i}' for i, name in enumerate(names)) else names


def _open_workdir(path: Path) -> Source:
  """A workdir of ours: its newest checkpoint, and of that the running mean if there is one; or what one has shared."""
  checkpoint = load_checkpoint(path)
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
  return Source(info, arrays, origin, {})


def unstack_blocks(params: Params) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
  """Params of ours with all blocks in one row, as `rules.py` names them (views), and where each is from.

  Class blocks stand apart, as `class_blocks/{i}/...`: patches do not go through them.
  """
  arrays: dict[str, np.ndarray] = {}
  origin: dict[str, tuple[str, ...]] = {}
  first = {'space': 0, 'motion': 0, 'class': 0}
  if 'space' in params:
    first['motion'] = len(params['space']['blocks']['mlp']['up']['bias'])
  for name in parameter_shapes(params):
    leaf: Any = params
    for part in name.split('/'):
      leaf = leaf[part]
    stage, blocks, rest = name.partition('/blocks/')
    if not blocks:
      leaf = leaf.reshape(-1, leaf.shape[-1]) if name == 'embedding/space' else leaf
      arrays[name], origin[name] = leaf, (name,)
      continue
    row = 'class_blocks' if stage == 'class' else 'blocks'
    for i, array in enumerate(leaf):
      ours = f'{row}/{first[stage] + i}/{rest}'
      arrays[ours], origin[ours] = array, (f'{stage}/blocks[{i}]/{rest}',)
  return arrays, origin
