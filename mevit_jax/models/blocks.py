"""Blocks of the three stages: attentions and an MLP, each with its own LayerNorm and residual connection."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.attention import Heads, attend, split_heads
from mevit_jax.models.layers import ACTIVATIONS, layer_norm, linear
from mevit_jax.models.platforms import ShardMapWrapper, dispatch_attention
from mevit_jax.models.rotary import rotate, rotate_patches

# Patches `b t n d`, and the class token `b d` or None. Frame tokens are behind the patches of their frame, `b t n+f d`,
# until the class stage.
Tokens = tuple[jax.Array, jax.Array | None]

# Queries, keys and values of a block's attentions by name. 'space' and 'motion': `b t n h k` of the patches in block
# order ('space': `b t n+f h k` with frame tokens), and `b h k` of the class token or None. 'class': the class token's
# query `b 1 h k`, the patches' `b t·n h k`.
Traced = dict[str, tuple[Heads, Heads | None]]

# Constrains the sharding of an activation `b ...`; its values do not change.
Constraint = Callable[[jax.Array], jax.Array]

_SAVED_NAMES = ('attention', 'mlp')


def identity(x):
  """Returns its argument: the `Constraint` and `ShardMapWrapper` of a single device."""
  return x


class Attention(nnx.Module):
  """LayerNorm and the query, key, value and output projections of an attention, eqs. 2 and 5."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    heads, dtype = (config.heads, config.width // config.heads), jnp.dtype(config.dtype)
    xavier = jax.nn.initializers.xavier_uniform()
    self.norm = layer_norm(config, rngs)
    self.query, self.key, self.value = (
      nnx.LinearGeneral(config.width, heads, kernel_init=xavier, dtype=dtype, rngs=rngs) for _ in range(3)
    )
    self.out = nnx.LinearGeneral(heads, config.width, axis=(-2, -1), kernel_init=xavier, dtype=dtype, rngs=rngs)

  def project(self, normed: jax.Array) -> Heads:
    """Projects normalized tokens `... d` to queries, keys and values `... d`, heads concatenated."""
    return Heads(linear(self.query, normed), linear(self.key, normed), linear(self.value, normed))

  def output(self, x: jax.Array) -> jax.Array:
    """Projects concatenated heads `... d` to `... d`."""
    return linear(self.out, x)


class MLP(nnx.Module):
  """LayerNorm and the MLP of eq. 5, by default with the exact (erf) GELU."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    dtype, xavier = jnp.dtype(config.dtype), jax.nn.initializers.xavier_uniform()
    self.activation = config.activation
    self.norm = layer_norm(config, rngs)
    self.up = nnx.Linear(config.width, config.mlp_dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(config.mlp_dim, config.width, kernel_init=xavier, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = checkpoint_name(linear(self.up, self.norm(x)), 'mlp')
    return linear(self.down, ACTIVATIONS[self.activation](hidden))


class PatchBlock(nnx.Module):
  """Block of the first two stages: space attention, motion attention in the second, and an MLP."""

  def __init__(self, config: MEViTConfig, attentions: Sequence[str], rngs: nnx.Rngs):
    self.config, self.order = config, tuple(attentions)
    for name in attentions:
      setattr(self, f'{name}_attention', Attention(config, rngs))
    self.mlp = MLP(config, rngs)

  def __call__(
    self, tokens: Tokens, drop_rate: jax.Array, key: jax.Array | None, wrap: ShardMapWrapper = identity
  ) -> Tokens:
    keys = _split(key, len(self.order) + 1)
    for name, attention_key in zip(self.order, keys, strict=False):
      tokens = _add(tokens, self._attention(name, tokens, wrap), drop_rate, attention_key)
    patches, token = tokens
    update = self.mlp(patches), None if token is None else self.mlp(token)
    return _add(tokens, update, drop_rate, keys[-1])

  def trace(self, tokens: Tokens) -> Traced:
    """Returns the queries, keys and values of each attention."""
    traced = {}
    for name in self.order:
      patches, token = self._project(name, tokens)
      width = self.config.width // self.config.heads
      traced[name] = split_heads(patches, width), token and split_heads(token, width)
      tokens = _add(tokens, self._attention(name, tokens, identity), jnp.zeros(()), None)
    return traced

  def _attention(self, name: str, tokens: Tokens, wrap: ShardMapWrapper) -> Tokens:
    attention = getattr(self, f'{name}_attention')
    output, token_output = dispatch_attention(name, *self._project(name, tokens), self.config, wrap)
    output, token_output = checkpoint_name((output, token_output), 'attention')
    update = attention.output(output), None if token_output is None else attention.output(token_output)
    return self._pad(update) if name == 'motion' and self.config.frame_tokens else update

  def _pad(self, update: Tokens) -> Tokens:
    """Appends zeros for the frame tokens, which motion attention leaves as they are: `b t n d` to `b t n+f d`."""
    patches, token = update
    return jnp.pad(patches, ((0, 0), (0, 0), (0, self.config.frame_tokens), (0, 0))), token

  def _project(self, name: str, tokens: Tokens) -> tuple[Heads, Heads | None]:
    patches, token = tokens
    attention = getattr(self, f'{name}_attention')
    joins = token is not None and (name == 'space' or self.config.class_token_in_motion)
    if name == 'motion' and self.config.frame_tokens:
      patches = patches[:, :, : self.config.patches]  # b t n d
    projected = rotate_patches(attention.project(attention.norm(patches)), self.config)  # b t n d
    return projected, attention.project(attention.norm(token)) if joins else None  # b d


class ClassBlock(nnx.Module):
  """Block of the class stage, eqs. 10 and 5: the class token attends to all patches; only the class token changes."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    self.config, self.head_width = config, config.width // config.heads
    self.class_attention = Attention(config, rngs)
    self.mlp = MLP(config, rngs)

  def __call__(
    self, tokens: Tokens, drop_rate: jax.Array, key: jax.Array | None, wrap: ShardMapWrapper = identity
  ) -> Tokens:
    del wrap  # one query per example: plain XLA on every platform
    keys = _split(key, 2)
    patches, token = tokens
    assert token is not None
    output = attend(*self._heads(tokens)).reshape(token.shape)  # b d
    output = checkpoint_name(output, 'attention')
    token = _drop_path(self.class_attention.output(output), drop_rate, keys[0]) + token
    return patches, _drop_path(self.mlp(token), drop_rate, keys[1]) + token

  def trace(self, tokens: Tokens) -> Traced:
    """Returns the queries, keys and values of class attention."""
    return {'class': (self._heads(tokens), None)}

  def _heads(self, tokens: Tokens) -> Heads:
    """Projects the query `b 1 h k` of the class token, and keys and values `b t·n h k` of the patches."""
    (patches, token), attention = tokens, self.class_attention
    assert token is not None
    flat = patches.reshape(patches.shape[0], -1, patches.shape[-1])  # b t·n d
    normed = attention.norm(flat)
    query = linear(attention.query, attention.norm(token)[:, None])  # b 1 d
    key, value = linear(attention.key, normed), linear(attention.value, normed)  # b t·n d
    if self.config.rotary_theta:
      key = rotate(key.reshape(patches.shape), self.config).reshape(flat.shape)  # b t·n d
    return split_heads(Heads(query, key, value), self.head_width)


class Stage(nnx.Module):
  """Stacked blocks of one kind: every parameter has a leading axis with one entry per block."""

  def __init__(self, config: MEViTConfig, make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
    self.config, self.depth = config, depth
    # The same keys as `rngs.split(depth)`, which flax 0.11 does not have.
    self.blocks = jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))

  def __call__(
    self,
    tokens: Tokens,
    drop_rates: jax.Array,
    key: jax.Array | None,
    constrain: Constraint = identity,
    wrap: ShardMapWrapper = identity,
  ) -> Tokens:
    """Runs the blocks in sequence, in one loop configured by `config.unroll` and `config.remat`.

    Args:
      tokens: patches `b t n d` (`b t n+f d` with frame tokens), and the class token `b d` or None.
      drop_rates: stochastic depth rate of each block, `depth`.
      key: PRNG key of stochastic depth; None disables it (evaluation).
      constrain: sharding constraint of the input of every block, see `build_model`.
      wrap: wrapper of every attention function, see `build_model`.
    """
    scanned = 0 < self.config.unroll < self.depth
    step = _rematerialize(
      lambda block, tokens, *args: block(jax.tree.map(constrain, tokens), *args, wrap), self.config.remat, scanned
    )
    keys = None if key is None else jax.random.split(key, self.depth)
    stacked = (self.blocks, drop_rates, keys)
    if not scanned:
      for block, rate, block_key in zip(*(_unstack(part, self.depth) for part in stacked), strict=True):
        tokens = step(block, tokens, rate, block_key)
      return tokens

    def body(tokens, inputs):
      block, rate, block_key = inputs
      return step(block, tokens, rate, block_key), None

    return jax.lax.scan(body, tokens, stacked, unroll=self.config.unroll)[0]

  def trace(self, tokens: Tokens) -> tuple[Tokens, list[Traced]]:
    """Returns the output tokens, and the queries, keys and values of the attentions of each block."""
    traced = []
    for block in _unstack(self.blocks, self.depth):
      traced.append(block.trace(tokens))
      tokens = block(tokens, jnp.zeros(()), None)
    return tokens, traced


def _unstack(tree, depth: int) -> list:
  """Splits a stacked tree, or one whose leaves are tuples (see `Model.unstack`), into the trees of the blocks.

  The gradient of one split is one concatenation; that of indexing would be one per block.
  """
  leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
  parts = [leaf if isinstance(leaf, tuple) else [part[0] for part in jnp.split(leaf, depth)] for leaf in leaves]
  return [jax.tree.unflatten(treedef, [leaf[i] for leaf in parts]) for i in range(depth)]


def _rematerialize(step: Callable, remat: str, scanned: bool) -> Callable:
  """Applies the rematerialization policy `config.remat` to a block."""
  if remat == 'none':
    return step
  policies = jax.checkpoint_policies
  policy = policies.nothing_saveable if remat == 'block' else policies.save_only_these_names(*_SAVED_NAMES)
  return jax.checkpoint(step, policy=policy, prevent_cse=not scanned)  # no CSE across loop iterations


def _split(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
  return [None] * count if key is None else list(jax.random.split(key, count))


def _add(tokens: Tokens, update: Tokens, rate: jax.Array, key: jax.Array | None) -> Tokens:
  """Adds the residual branch; stochastic depth drops it for all tokens of an example, including the class token."""
  (patches, token), (patch_update, token_update) = tokens, update
  if token is not None and token_update is not None:
    token = token + _drop_path(token_update, rate, key)
  return patches + _drop_path(patch_update, rate, key), token


def _drop_path(update: jax.Array, rate: jax.Array, key: jax.Array | None) -> jax.Array:
  """Applies stochastic depth (Huang et al. 2016): drops updates of examples at this rate and rescales the others."""
  if key is None:
    return update
  mask = jax.random.bernoulli(key, 1 - rate, (update.shape[0],) + (1,) * (update.ndim - 1))
  return jnp.where(mask, update / (1 - rate), 0).astype(update.dtype)  # divided in float32
