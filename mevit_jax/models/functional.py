"""Functional interface of the model: pure functions of a nested dict of params. The only user of NNX state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.blocks import Constraint, Traced, identity
from mevit_jax.models.mevit import STAGES, MEViT
from mevit_jax.models.platforms import ShardMapWrapper
from mevit_jax.trees import path_name

# Top-level names of the parameters of a space encoder.
ENCODER = ('embedding', 'frame_tokens', 'pre_norm', 'space', 'space_norm')

# The last linear layer of each branch of a motion block.
_LAST_LAYERS = {'space_attention': 'out', 'motion_attention': 'out', 'mlp': 'down'}

# Nested dict of arrays, keyed by parameter name.
Params = dict


@dataclasses.dataclass(frozen=True)
class Model:
  """A model as pure functions of its params.

  Attributes:
    config: model config.
    abstract: params as `jax.ShapeDtypeStruct`s.
    init: key -> params.
    apply: (params, video `b t h w 3`, key=None) -> logits `b classes` float32; key=None means evaluation.
    tokens: (params, video, key=None) -> patches `b t n d` in block order and class token `b d` after the last block;
      see `MEViT.tokens`.
    encode: (params, video) -> features `b t n+f d` of every frame alone; for models with `space_encoder`.
    classify: (params, features, key=None) -> logits; `apply` is `classify` of `encode`.
    trace: (params, video, block) -> queries, keys and values of the block's attentions, see `blocks.Traced`; `block`
      is an index over the blocks of all stages, negative from the end, or a slice, which returns a list.
    unstack: params -> params with a tuple of arrays, one per block, for each stacked parameter; the functions above
      accept both. For inference: a program otherwise copies the weights of each block out of the stack at every call
      (unless `config.unroll` is set).
  """

  config: MEViTConfig
  abstract: Params
  init: Callable[..., Params]
  apply: Callable[..., jax.Array]
  tokens: Callable[..., tuple[jax.Array, jax.Array]]
  encode: Callable[..., jax.Array]
  classify: Callable[..., jax.Array]
  trace: Callable[..., Any]
  unstack: Callable[[Params], Params]


def build_model(config: MEViTConfig, constrain: Constraint = identity, wrap: ShardMapWrapper = identity) -> Model:
  """Builds the model of a config.

  Args:
    config: model config.
    constrain: sharding constraint of activations, applied to the input of every block and of the head, see
      `parallel.placement.constrain_batch`. The model itself does not know the mesh.
    wrap: wraps an attention function in `jax.shard_map`, so that each device computes its shard of the batch and heads,
      see `parallel.placement.shard_attention`. The SPMD partitioner cannot partition custom kernels.

  Raises:
    UserError: the config does not have a number of classes.
  """
  if not config.classes:
    raise UserError('`model.classes` is 0; set the number of classes')
  graphdef, state = nnx.split(nnx.eval_shape(lambda: MEViT(config, nnx.Rngs(0))))
  abstract = nnx.to_pure_dict(state)

  def init(key: jax.Array) -> Params:
    params = nnx.to_pure_dict(nnx.state(MEViT(config, nnx.Rngs(key)), nnx.Param))
    return init_motion(params, config)

  def merge(params: Params) -> MEViT:
    check_params(params, abstract if _is_stacked(params) else jax.eval_shape(unstack, abstract))
    return nnx.merge(graphdef, params)

  def bind(params: Params, video: jax.Array) -> MEViT:
    _check_video(video, config)
    return merge(params)

  def apply(params: Params, video: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return bind(params, video)(video, key, constrain, wrap)

  def tokens(params: Params, video: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    return bind(params, video).tokens(video, key, constrain, wrap)

  def encode(params: Params, video: jax.Array) -> jax.Array:
    return bind(params, video).encode(video, constrain, wrap)

  def classify(params: Params, features: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return merge(params).classify(features, key, constrain, wrap)

  def trace(params: Params, video: jax.Array, block: int | slice) -> Traced | list[Traced]:
    return bind(params, video).trace(video)[block]

  def unstack(params: Params) -> Params:
    if config.unroll:
      return params
    return {name: jax.tree.map(tuple, part) if name in STAGES else part for name, part in params.items()}

  return Model(config, abstract, init, apply, tokens, encode, classify, trace, unstack)


def _is_stacked(params: Params) -> bool:
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, tuple))
  return not any(isinstance(leaf, tuple) for leaf in leaves)


def init_motion(params: Params, config: MEViTConfig) -> Params:
  """Initializes motion attention as `config.motion_init` says, see `MEViTConfig`.

  The motion blocks behind a space encoder are not the encoder's, so that 'zero' makes all of a block add nothing.
  """
  method = config.motion_init
  if method == 'random' or 'motion' not in params:
    return params
  blocks = params['motion']['blocks']
  if method == 'zero' and config.space_encoder:
    zeros = {name: jax.tree.map(jnp.zeros_like, blocks[name][last]) for name, last in _LAST_LAYERS.items()}
    blocks = {name: {**blocks[name], last: zeros[name]} for name, last in _LAST_LAYERS.items()}
    return {**params, 'motion': {'blocks': blocks}}
  motion = jax.tree.map(jnp.copy, blocks['space_attention'])  # a copy: donated buffers must not be shared
  if method == 'zero':
    motion = {**motion, 'out': jax.tree.map(jnp.zeros_like, motion['out'])}
  return {**params, 'motion': {'blocks': {**blocks, 'motion_attention': motion}}}


def count_parameters(params: Params) -> int:
  """Returns the number of parameters of (abstract) params."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def parameter_shapes(params: Params) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter by name, as 'motion/blocks/mlp/up/kernel'."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def check_params(params: Params, abstract: Params) -> None:
  """Raises a ValueError if names or shapes differ: NNX itself matches parameters by position."""
  actual, expected = parameter_shapes(params), parameter_shapes(abstract)
  if actual == expected:
    return
  missing = [name for name in expected if name not in actual]
  unknown = [name for name in actual if name not in expected]
  shapes = [f'{n}: {actual[n]}, not {s}' for n, s in expected.items() if n in actual and actual[n] != s]
  raise ValueError(
    f'the params do not match the model: missing {missing[:3]}, unknown {unknown[:3]}, different shape {shapes[:3]}'
  )


def _check_video(video: jax.Array, config: MEViTConfig) -> None:
  expected = (config.frames, *config.image_size, 3)
  if video.ndim != 5 or video.shape[1:] != expected:
    raise ValueError(f'the video must have shape b t h w 3 = (b, {", ".join(map(str, expected))}), not {video.shape}')
  if not jnp.issubdtype(video.dtype, jnp.floating):
    raise ValueError(f'the video must be normalized floating point, not {video.dtype}')
