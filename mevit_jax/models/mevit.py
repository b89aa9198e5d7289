"""MEViT: embedding, three stages of blocks, LayerNorm and a linear head."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.blocks import ClassBlock, Constraint, PatchBlock, Stage, Tokens, Traced, identity
from mevit_jax.models.embed import Embedding
from mevit_jax.models.layers import layer_norm
from mevit_jax.models.platforms import ShardMapWrapper

# Stochastic depth: the rate of every block, and the PRNG key of every stage (None: disabled).
StochasticDepth = tuple[jax.Array, Sequence[jax.Array | None]]

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
    if config.space_encoder:
      self.space_norm = layer_norm(config, rngs)
      self.time_position = nnx.Param(unit(rngs.params(), (config.frames, config.width)))
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
    return self._classify(token, constrain)

  def encode(self, video: jax.Array, constrain: Constraint = identity, wrap: ShardMapWrapper = identity) -> jax.Array:
    """Returns the features of every frame, `b t n+f d`: what the space stage of a model with `space_encoder` gives.

    Patches are in block order; frame tokens are behind those of their frame.
    """
    tokens, _ = self._space_stage(self._embed(video)[0], self._stochastic_depth(None), constrain, wrap)
    return tokens

  def classify(
    self,
    features: jax.Array,
    key: jax.Array | None = None,
    constrain: Constraint = identity,
    wrap: ShardMapWrapper = identity,
  ) -> jax.Array:
    """Returns the logits `b classes` of features `b t n+f d` of `encode`: `classify(encode(video))` classifies it."""
    start = self._start(features) if self.config.has_class_token else None
    _, token = self._later_stages((features, None), start, self._stochastic_depth(key), constrain, wrap)
    return self._classify(token, constrain)

  def _classify(self, token: jax.Array, constrain: Constraint) -> jax.Array:
    """Returns the logits `b classes` of the class token `b d`, or of the first frame token of all frames, `b t d`."""
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
    tokens, start = self._embed(video)
    depth = self._stochastic_depth(key)
    tokens = self._space_stage(tokens, depth, constrain, wrap)
    return self._later_stages(tokens, start, depth, constrain, wrap)

  def _space_stage(
    self, tokens: Tokens, depth: StochasticDepth, constrain: Constraint, wrap: ShardMapWrapper
  ) -> Tokens:
    """Returns the tokens behind the space stage, and behind its norm with `space_encoder`."""
    config, (rates, keys) = self.config, depth
    if config.space_blocks:
      tokens = self.space(tokens, rates[: config.space_blocks], keys[0], constrain, wrap)
    if config.space_encoder:
      tokens = self.space_norm(tokens[0]), None
    return tokens

  def _later_stages(
    self,
    tokens: Tokens,
    start: jax.Array | None,
    depth: StochasticDepth,
    constrain: Constraint,
    wrap: ShardMapWrapper,
  ) -> tuple[jax.Array, jax.Array]:
    """Runs the motion and class stages; see `tokens`."""
    config, (rates, keys) = self.config, depth
    first, second = config.space_blocks, config.space_blocks + config.motion_blocks
    if config.space_encoder:
      tokens = self._add_time(tokens[0]), None
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
      if name == 'space' and self.config.space_encoder:
        tokens = self._add_time(self.space_norm(tokens[0])), None
    return traced

  def _stochastic_depth(self, key: jax.Array | None) -> StochasticDepth:
    """Returns the rate of every block, and the PRNG key of every stage; None disables it."""
    config = self.config
    rates = jnp.linspace(0, config.drop_path, config.depth)
    if key is None or not config.drop_path:
      return rates, [None] * len(STAGES)
    keys = list(jax.random.split(key, len(STAGES)))
    return rates, [None, *keys[1:]] if config.space_encoder else keys

  def _add_time(self, features: jax.Array) -> jax.Array:
    """Adds the positions in time to the features `b t n+f d` of a space encoder."""
    return features + self.time_position[...][:, None].astype(features.dtype)

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
    start = self._start(patches)
    return (patches, start if config.class_blocks == 0 else None), start

  def _start(self, patches: jax.Array) -> jax.Array:
    """Returns the initial class token, `b d`, for patches `b ...`."""
    start = (self.class_token[...] + self.class_position[...]).astype(patches.dtype)
    start = jnp.broadcast_to(start, (patches.shape[0], self.config.width))  # b d
    return self.pre_norm(start) if self.config.pre_norm else start

  def _patches(self, tokens: Tokens) -> jax.Array:
    """Returns the patches `b t n d` without the frame tokens behind them."""
    return tokens[0][:, :, : self.config.patches] if self.config.frame_tokens else tokens[0]
