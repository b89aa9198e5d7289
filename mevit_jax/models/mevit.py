"""MEViT: embedding, three stages of blocks, LayerNorm and a linear head."""

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.blocks import ClassBlock, Constraint, PatchBlock, Stage, Tokens, Traced, identity
from mevit_jax.models.embed import Embedding
from mevit_jax.models.layers import layer_norm
from mevit_jax.models.platforms import ShardMapWrapper

# Stages in order: attributes of `MEViT` and top-level names of its params.
STAGES = ('space', 'motion', 'class')


class MEViT(nnx.Module):
  """Motion Enhanced Video Transformer (Li and Zhuang, MMM 2022)."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    self.config = config
    self.embedding = Embedding(config, rngs)
    unit = jax.nn.initializers.normal(1.0)
    if config.has_class_token:
      self.class_token = nnx.Param(jnp.zeros(config.width))
      self.class_position = nnx.Param(unit(rngs.params(), (config.width,)))
    if config.frame_tokens:
      self.frame_tokens = nnx.Param(unit(rngs.params(), (config.frame_tokens, config.width)))
    if config.pre_norm:
      self.pre_norm = layer_norm(config, rngs)
    # Empty stages are absent: checkpoints cannot store arrays of size zero.
    if config.space_blocks:
      self.space = Stage(config, lambda r: PatchBlock(config, ('space',), r), config.space_blocks, rngs)
    if config.motion_blocks:
      self.motion = Stage(config, lambda r: PatchBlock(config, config.attentions, r), config.motion_blocks, rngs)
    if config.class_blocks:
      stage = Stage(config, lambda r: ClassBlock(config, r), config.class_blocks, rngs)
      setattr(self, 'class', stage)  # a Python keyword
    self.norm = layer_norm(config, rngs)
    self.head = nnx.Linear(config.width, config.classes, kernel_init=jax.nn.initializers.zeros, rngs=rngs)

  def __call__(
    self,
    video: jax.Array,
    key: jax.Array | None = None,
    constrain: Constraint = identity,
    wrap: ShardMapWrapper = identity,
  ) -> jax.Array:
    """Classifies clips.

    Args:
      video: `b t h w 3`, normalized.
      key: PRNG key of stochastic depth; None disables it (evaluation).
      constrain: sharding constraint of activations, see `build_model`.
      wrap: wrapper of attention functions, see `build_model`.

    Returns:
      Logits `b classes`, float32.
    """
    _, token = self.tokens(video, key, constrain, wrap)
    normed = self.norm(constrain(token))
    if not self.config.has_class_token:
      normed = normed.mean(axis=1)  # b d
    return self.head(normed.astype(self.head.kernel.dtype))  # eq. 9

  def tokens(
    self,
    video: jax.Array,
    key: jax.Array | None = None,
    constrain: Constraint = identity,
    wrap: ShardMapWrapper = identity,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the patches `b t n d` (in block order) and the class token `b d` after the last block.

    Without class blocks, frame tokens replace the class token: the first one of each frame is returned, `b t d`.
    """
    config = self.config
    tokens, start = self._embed(video)
    rates = jnp.linspace(0, config.drop_path, config.depth)
    keys = [None] * 3 if key is None or not config.drop_path else jax.random.split(key, 3)
    first, second = config.space_blocks, config.space_blocks + config.motion_blocks
    if config.space_blocks:
      tokens = self.space(tokens, rates[:first], keys[0], constrain, wrap)
    if config.motion_blocks:
      tokens = self.motion(tokens, rates[first:second], keys[1], constrain, wrap)
    if config.class_blocks:
      class_stage = getattr(self, 'class')
      tokens = class_stage((self._patches(tokens), start), rates[second:], keys[2], constrain, wrap)
    patches, token = tokens
    if not config.has_class_token:
      return self._patches(tokens), patches[:, :, config.patches]  # b t n d, b t d
    assert token is not None  # an input of the first block, or of the class stage
    return patches, token

  def trace(self, video: jax.Array) -> list[Traced]:
    """Returns the queries, keys and values of the attentions of every block."""
    tokens, start = self._embed(video)
    traced: list[Traced] = []
    for name in STAGES:
      if stage := getattr(self, name, None):
        tokens, blocks = stage.trace((self._patches(tokens), start) if name == 'class' else tokens)
        traced += blocks
    return traced

  def _embed(self, video: jax.Array) -> tuple[Tokens, jax.Array | None]:
    """Returns the inputs of the first block, and the initial class token `b d`, which may enter at the class stage."""
    config, patches = self.config, self.embedding(video)  # b t n d
    if config.frame_tokens:
      shape = (*patches.shape[:2], *self.frame_tokens.shape)  # b t f d
      frame_tokens = jnp.broadcast_to(self.frame_tokens[...].astype(patches.dtype), shape)
      patches = jnp.concatenate([patches, frame_tokens], axis=2)  # b t n+f d
    if config.pre_norm:
      patches = self.pre_norm(patches)
    if not config.has_class_token:
      return (patches, None), None
    start = (self.class_token[...] + self.class_position[...]).astype(patches.dtype)
    start = jnp.broadcast_to(start, (patches.shape[0], config.width))  # b d
    if config.pre_norm:
      start = self.pre_norm(start)
    return (patches, start if config.class_blocks == 0 else None), start

  def _patches(self, tokens: Tokens) -> jax.Array:
    """Returns the patches `b t n d` without the frame tokens behind them."""
    return tokens[0][:, :, : self.config.patches] if self.config.frame_tokens else tokens[0]
