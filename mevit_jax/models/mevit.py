"""MEViT: embedding, three stages of blocks, the class token's norm, and a linear head."""

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.blocks import ClassBlock, Keep, PatchBlock, Stage, Tokens, Traced, identity
from mevit_jax.models.embed import Embedding
from mevit_jax.models.layers import layer_norm
from mevit_jax.models.platforms import Each

# Where the blocks are, in their order.
STAGES = ('space', 'motion', 'classify')


class MEViT(nnx.Module):
  """Motion Enhanced Video Transformer (Li and Zhuang, MMM 2022)."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    self.config = config
    self.embedding = Embedding(config, rngs)
    self.class_token = nnx.Param(jnp.zeros(config.width))
    self.class_position = nnx.Param(jax.nn.initializers.normal(1.0)(rngs.params(), (config.width,)))
    # A stage without blocks is absent: checkpoints cannot hold arrays of size zero.
    if config.space_blocks:
      self.space = Stage(config, lambda r: PatchBlock(config, ('space',), r), config.space_blocks, rngs)
    if config.motion_blocks:
      self.motion = Stage(config, lambda r: PatchBlock(config, config.attentions, r), config.motion_blocks, rngs)
    if config.class_blocks:
      self.classify = Stage(config, lambda r: ClassBlock(config, r), config.class_blocks, rngs)
    self.norm = layer_norm(config, rngs)
    self.head = nnx.Linear(config.width, config.classes, kernel_init=jax.nn.initializers.zeros, rngs=rngs)

  def __call__(
    self, video: jax.Array, key: jax.Array | None = None, keep: Keep = identity, each: Each = identity
  ) -> jax.Array:
    """Classifies clips.

    Args:
      video: `b t h w 3`, normalised.
      key: of stochastic depth; None means evaluation.
      keep: what activations go through, see `build_model`.
      each: what the functions of attention go through, likewise.

    Returns:
      Logits `b classes`, float32.
    """
    _, token = self.tokens(video, key, keep, each)
    return self.head(self.norm(keep(token)).astype(self.head.kernel.dtype))  # eq. 9

  def tokens(
    self, video: jax.Array, key: jax.Array | None = None, keep: Keep = identity, each: Each = identity
  ) -> tuple[jax.Array, jax.Array]:
    """The patches `b t n d` (in block order) and the class token `b d` after the last block."""
    config = self.config
    tokens, start = self._start(video)
    rates = jnp.linspace(0, config.drop_path, config.depth)
    keys = [None] * 3 if key is None or not config.drop_path else jax.random.split(key, 3)
    first, second = config.space_blocks, config.space_blocks + config.motion_blocks
    if config.space_blocks:
      tokens = self.space(tokens, rates[:first], keys[0], keep, each)
    if config.motion_blocks:
      tokens = self.motion(tokens, rates[first:second], keys[1], keep, each)
    if config.class_blocks:
      tokens = self.classify((tokens[0], start), rates[second:], keys[2], keep, each)
    patches, token = tokens
    assert token is not None  # there from the start, or since the class stage
    return patches, token

  def trace(self, video: jax.Array) -> list[Traced]:
    """What the attentions of every block read."""
    tokens, start = self._start(video)
    traced: list[Traced] = []
    for name in STAGES:
      if stage := getattr(self, name, None):
        tokens, found = stage.trace((tokens[0], start) if name == 'classify' else tokens)
        traced += found
    return traced

  def _start(self, video: jax.Array) -> tuple[Tokens, jax.Array]:
    """The tokens before the first block, and the class token's start `b d`, which is among them or waits."""
    patches = self.embedding(video)  # b t n d
    start = (self.class_token[...] + self.class_position[...]).astype(patches.dtype)
    start = jnp.broadcast_to(start, (patches.shape[0], self.config.width))  # b d
    return (patches, start if self.config.class_blocks == 0 else None), start
