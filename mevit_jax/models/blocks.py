"""The blocks of the three stages: attentions and a feed-forward network, each with its own norm and residual."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.attention import Heads, attend, by_heads
from mevit_jax.models.layers import gelu, layer_norm, linear
from mevit_jax.models.platforms import Each, grouped

# Patches `b t n d`, and the class token `b d` where there is one.
Tokens = tuple[jax.Array, jax.Array | None]

# What a block's attentions read, by name. 'space' and 'motion': of the patches `b t n h k`, in block order, and of the
# class token `b h k` where it joins. 'class': the class token's query `b 1 h k`, and `b t·n h k` of the patches.
Traced = dict[str, tuple[Heads, Heads | None]]

# What keeps an activation `b ...` where it is to be; it changes no number.
Keep = Callable[[jax.Array], jax.Array]

_REMAT_KEEPS = ('attention', 'mlp')


def identity(x):
  """A `Keep` and an `Each` that does nothing: the devices are one, or need no telling."""
  return x


class Attention(nnx.Module):
  """LayerNorm and the projections of an attention, eqs. 2 and 5: queries, keys, values, and output."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    heads, dtype = (config.heads, config.width // config.heads), jnp.dtype(config.dtype)
    xavier = jax.nn.initializers.xavier_uniform()
    self.norm = layer_norm(config, rngs)
    self.query, self.key, self.value = (
      nnx.LinearGeneral(config.width, heads, kernel_init=xavier, dtype=dtype, rngs=rngs) for _ in range(3)
    )
    self.out = nnx.LinearGeneral(heads, config.width, axis=(-2, -1), kernel_init=xavier, dtype=dtype, rngs=rngs)

  def project(self, normed: jax.Array) -> Heads:
    """`... d` -> queries, keys and values `... d`, heads side by side."""
    return Heads(linear(self.query, normed), linear(self.key, normed), linear(self.value, normed))

  def output(self, x: jax.Array) -> jax.Array:
    """`... d`, heads side by side -> `... d`."""
    return linear(self.out, x)


class MLP(nnx.Module):
  """LayerNorm and the feed-forward network of eq. 5, with the exact (erf) GELU."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    dtype, xavier = jnp.dtype(config.dtype), jax.nn.initializers.xavier_uniform()
    self.norm = layer_norm(config, rngs)
    self.up = nnx.Linear(config.width, config.mlp_dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(config.mlp_dim, config.width, kernel_init=xavier, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = checkpoint_name(linear(self.up, self.norm(x)), 'mlp')
    return linear(self.down, gelu(hidden))


class PatchBlock(nnx.Module):
  """A block of the first two stages: space attention (and motion attention), then the feed-forward network."""

  def __init__(self, config: MEViTConfig, attentions: Sequence[str], rngs: nnx.Rngs):
    self.config, self.order = config, tuple(attentions)
    for name in attentions:
      setattr(self, f'{name}_attention', Attention(config, rngs))
    self.mlp = MLP(config, rngs)

  def __call__(self, tokens: Tokens, drop_rate: jax.Array, key: jax.Array | None, each: Each = identity) -> Tokens:
    keys = _split(key, len(self.order) + 1)
    for name, one_key in zip(self.order, keys, strict=False):
      tokens = _add(tokens, self._attention(name, tokens, each), drop_rate, one_key)
    patches, token = tokens
    update = self.mlp(patches), None if token is None else self.mlp(token)
    return _add(tokens, update, drop_rate, keys[-1])

  def trace(self, tokens: Tokens) -> Traced:
    """What each attention reads."""
    traced = {}
    for name in self.order:
      patches, token = self._project(name, tokens)
      width = self.config.width // self.config.heads
      traced[name] = by_heads(patches, width), token and by_heads(token, width)
      tokens = _add(tokens, self._attention(name, tokens, identity), jnp.zeros(()), None)
    return traced

  def _attention(self, name: str, tokens: Tokens, each: Each) -> Tokens:
    attention = getattr(self, f'{name}_attention')
    output, token_output = grouped(name, *self._project(name, tokens), self.config, each)
    output, token_output = checkpoint_name((output, token_output), 'attention')
    return attention.output(output), None if token_output is None else attention.output(token_output)

  def _project(self, name: str, tokens: Tokens) -> tuple[Heads, Heads | None]:
    patches, token = tokens
    attention = getattr(self, f'{name}_attention')
    joins = token is not None and (name == 'space' or self.config.class_token_in_motion)
    projected = attention.project(attention.norm(patches))  # b t n d
    return projected, attention.project(attention.norm(token)) if joins else None  # b d


class ClassBlock(nnx.Module):
  """A block of the class stage, eqs. 10 and 5: the class token reads all patches, and only it changes."""

  def __init__(self, config: MEViTConfig, rngs: nnx.Rngs):
    self.head_width = config.width // config.heads
    self.class_attention = Attention(config, rngs)
    self.mlp = MLP(config, rngs)

  def __call__(self, tokens: Tokens, drop_rate: jax.Array, key: jax.Array | None, each: Each = identity) -> Tokens:
    del each  # one query an example: XLA's own attention serves everywhere
    keys = _split(key, 2)
    patches, token = tokens
    assert token is not None
    output = attend(*self._heads(tokens)).reshape(token.shape)  # b d
    output = checkpoint_name(output, 'attention')
    token = _drop_path(self.class_attention.output(output), drop_rate, keys[0]) + token
    return patches, _drop_path(self.mlp(token), drop_rate, keys[1]) + token

  def trace(self, tokens: Tokens) -> Traced:
    """What class attention reads."""
    return {'class': (self._heads(tokens), None)}

  def _heads(self, tokens: Tokens) -> Heads:
    """The class token's query `b 1 h k`, the patches' keys and values `b t·n h k`."""
    (patches, token), attention = tokens, self.class_attention
    assert token is not None
    flat = patches.reshape(patches.shape[0], -1, patches.shape[-1])  # b t·n d
    normed = attention.norm(flat)
    query = linear(attention.query, attention.norm(token)[:, None])  # b 1 d
    return by_heads(Heads(query, linear(attention.key, normed), linear(attention.value, normed)), self.head_width)


class Stage(nnx.Module):
  """Blocks of one kind, stacked: every parameter has a leading axis, one entry a block."""

  def __init__(self, config: MEViTConfig, make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
    self.config, self.depth = config, depth
    self.blocks = jax.vmap(make)(rngs.split(depth))

  def __call__(
    self,
    tokens: Tokens,
    drop_rates: jax.Array,
    key: jax.Array | None,
    keep: Keep = identity,
    each: Each = identity,
  ) -> Tokens:
    """Runs the blocks one after the other, as one loop that `config.unroll` and `config.remat` shape.

    Args:
      tokens: `b t n d` and `b d` or None.
      drop_rates: `depth`: each block's rate of stochastic depth.
      key: of stochastic depth; None means evaluation.
      keep: what every block's tokens go through, see `build_model`.
      each: what every attention's function goes through, likewise.
    """
    scanned = 0 < self.config.unroll < self.depth
    step = _rematerialised(
      lambda block, tokens, *args: block(jax.tree.map(keep, tokens), *args, each), self.config.remat, scanned
    )
    keys = None if key is None else jax.random.split(key, self.depth)
    stacked = (self.blocks, drop_rates, keys)
    if not scanned:
      for block, rate, one_key in zip(*(_unstack(part, self.depth) for part in stacked), strict=True):
        tokens = step(block, tokens, rate, one_key)
      return tokens

    def body(tokens, inputs):
      block, rate, one_key = inputs
      return step(block, tokens, rate, one_key), None

    return jax.lax.scan(body, tokens, stacked, unroll=self.config.unroll)[0]

  def trace(self, tokens: Tokens) -> tuple[Tokens, list[Traced]]:
    """The tokens after the blocks, and what the attentions of each block read."""
    traced = []
    for block in _unstack(self.blocks, self.depth):
      traced.append(block.trace(tokens))
      tokens = block(tokens, jnp.zeros(()), None)
    return tokens, traced


def _unstack(tree, depth: int) -> list:
  """The blocks of a stacked tree, or of one whose leaves are tuples already (see `Model.unstack`).

  Splitting at once has one concatenation as its gradient, indexing one a block.
  """
  leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
  parts = [leaf if isinstance(leaf, tuple) else [part[0] for part in jnp.split(leaf, depth)] for leaf in leaves]
  return [jax.tree.unflatten(treedef, [leaf[i] for leaf in parts]) for i in range(depth)]


def _rematerialised(step: Callable, remat: str, scanned: bool) -> Callable:
  if remat == 'none':
    return step
  policies = jax.checkpoint_policies
  policy = policies.nothing_saveable if remat == 'block' else policies.save_only_these_names(*_REMAT_KEEPS)
  return jax.checkpoint(step, policy=policy, prevent_cse=not scanned)  # a loop's body is merged with no other


def _split(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
  return [None] * count if key is None else list(jax.random.split(key, count))


def _add(tokens: Tokens, update: Tokens, rate: jax.Array, key: jax.Array | None) -> Tokens:
  """Residuals; a dropped path is dropped for all tokens of an example, the class token among them."""
  (patches, token), (patch_update, token_update) = tokens, update
  if token is not None and token_update is not None:
    token = token + _drop_path(token_update, rate, key)
  return patches + _drop_path(patch_update, rate, key), token


def _drop_path(update: jax.Array, rate: jax.Array, key: jax.Array | None) -> jax.Array:
  """Stochastic depth (Huang et al. 2016): drops an example's update with this rate, and scales what is kept."""
  if key is None:
    return update
  keep = jax.random.bernoulli(key, 1 - rate, (update.shape[0],) + (1,) * (update.ndim - 1))
  return jnp.where(keep, update / (1 - rate), 0).astype(update.dtype)  # divided in float32
