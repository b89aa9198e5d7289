"""From a module to functions of plain params: the one place that knows how NNX keeps its state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.blocks import Keep, Traced, identity
from mevit_jax.models.mevit import STAGES, MEViT
from mevit_jax.models.platforms import Each

# A nested dict of arrays, keyed by the parameters' names.
Params = dict


@dataclasses.dataclass(frozen=True)
class Model:
  """A model as functions of its params.

  Attributes:
    config: what it is.
    abstract: names, shapes and dtypes of the params.
    init: key -> params.
    apply: (params, video `b t h w 3`, key=None) -> logits `b classes` float32; key=None means evaluation.
    tokens: likewise -> patches `b t n d` in block order and class token `b d` after the last block.
    trace: (params, video, block) -> queries, keys and values of that block's attentions, see `blocks.Traced`; the
      block is an index over all stages' blocks, negative from the end, or a slice for a list of them.
    unstack: params -> the same, each block's apart, which the functions above take as well: for inference, where a
      program would else copy every block's weights out of the stack at each call (unless `config.unroll` is set).
  """

  config: MEViTConfig
  abstract: Params
  init: Callable[..., Params]
  apply: Callable[..., jax.Array]
  tokens: Callable[..., tuple[jax.Array, jax.Array]]
  trace: Callable[..., Any]
  unstack: Callable[[Params], Params]


def build_model(config: MEViTConfig, keep: Keep = identity, each: Each = identity) -> Model:
  """The model of a config; a UserError where the number of classes is still open.

  Args:
    config: what it is.
    keep: what the tokens go through before every block and at the end: on many devices, a function that holds them
      where they are to be (see `parallel/placement.constrain_batch`); the model itself knows no devices.
    each: on many devices, makes of an attention of all rows and heads one in which each device has its own (see
      `parallel/placement.shard_attention`): the compiler does not part kernels that are not its own.
  """
  if not config.classes:
    raise UserError('classes is 0: say how many labels the model tells apart')
  graphdef, state = nnx.split(nnx.eval_shape(lambda: MEViT(config, nnx.Rngs(0))))
  abstract = nnx.to_pure_dict(state)

  def init(key: jax.Array) -> Params:
    params = nnx.to_pure_dict(nnx.state(MEViT(config, nnx.Rngs(key)), nnx.Param))
    return init_motion(params, config.motion_init)

  def bind(params: Params, video: jax.Array) -> MEViT:
    check_params(params, abstract if _is_stacked(params) else jax.eval_shape(unstack, abstract))
    _check_video(video, config)
    return nnx.merge(graphdef, params)

  def apply(params: Params, video: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return bind(params, video)(video, key, keep, each)

  def tokens(params: Params, video: jax.Array, key: jax.Array | None = None):
    return bind(params, video).tokens(video, key, keep, each)

  def trace(params: Params, video: jax.Array, block: int | slice) -> Traced | list[Traced]:
    return bind(params, video).trace(video)[block]

  def unstack(params: Params) -> Params:
    if config.unroll:
      return params
    return {name: jax.tree.map(tuple, part) if name in STAGES else part for name, part in params.items()}

  return Model(config, abstract, init, apply, tokens, trace, unstack)


def _is_stacked(params: Params) -> bool:
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, tuple))
  return not any(isinstance(leaf, tuple) for leaf in leaves)


def init_motion(params: Params, start: str) -> Params:
  """Sets how motion attention starts: as it is ('random'), from space attention ('copy'), or that and mute ('zero')."""
  if start == 'random' or 'motion' not in params:
    return params
  blocks = params['motion']['blocks']
  motion = jax.tree.map(jnp.copy, blocks['space_attention'])  # a copy: donated buffers must not be shared
  if start == 'zero':
    motion = {**motion, 'out': jax.tree.map(jnp.zeros_like, motion['out'])}
  return {**params, 'motion': {'blocks': {**blocks, 'motion_attention': motion}}}


def count_parameters(params: Params) -> int:
  """How many numbers the params hold; abstract params will do."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def parameter_shapes(params: Params) -> dict[str, tuple[int, ...]]:
  """Every parameter's path, 'motion/blocks/mlp/up/kernel', and shape."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape) for path, leaf in leaves}


def check_params(params: Params, abstract: Params) -> None:
  """Raises a ValueError that names what differs: NNX itself would match parameters by position."""
  given, wanted = parameter_shapes(params), parameter_shapes(abstract)
  if given == wanted:
    return
  missing = [name for name in wanted if name not in given]
  unknown = [name for name in given if name not in wanted]
  shapes = [f'{n}: {given[n]}, not {wanted[n]}' for n in wanted if n in given and given[n] != wanted[n]]
  raise ValueError(
    'these are not the parameters of this model: '
    f'missing {missing[:3]}, unknown {unknown[:3]}, of another shape {shapes[:3]}'
  )


def _check_video(video: jax.Array, config: MEViTConfig) -> None:
  expected = (config.frames, *config.image_size, 3)
  if video.ndim != 5 or video.shape[1:] != expected:
    raise ValueError(f'the video must be b t h w 3 = (b, {", ".join(map(str, expected))}), not {video.shape}')
  if not jnp.issubdtype(video.dtype, jnp.floating):
    raise ValueError(f'the video must be normalised floating point, not {video.dtype}')
