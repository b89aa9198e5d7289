"""Where a model looks: the weights of its own attentions, from what `Model.trace` says they read."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mevit_jax.augment.clip import normalize
from mevit_jax.config.data import Normalization
from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.attention import Heads, join, motion_groups
from mevit_jax.models.blocks import Traced
from mevit_jax.models.functional import Model, Params
from mevit_jax.models.order import to_block_order

Patch = tuple[int, int, int]  # frame, row, column
Kind = tuple[str, int]  # what a heat map is of, 'space', 'motion', 'class' or 'rollout', and of which block


class Group(NamedTuple):
  """The weights of an attention in some groups of tokens, and which tokens these are.

  A token is a number: patches by frame, row and column of the grid, then the class token.

  Attributes:
    weights: `b g h q s`, float32: of every query over the keys; they sum to 1.
    values: `b g s h k`: what they are the weights of.
    queries: `g q`.
    keys: `g s`.
  """

  weights: jax.Array
  values: jax.Array
  queries: jax.Array
  keys: jax.Array


def count_tokens(config: MEViTConfig) -> int:
  """Patches of a clip and the class token, which is the last one."""
  return config.frames * config.grid[0] * config.grid[1] + 1


def attention_groups(traced: Traced, name: str, config: MEViTConfig) -> list[Group]:
  """The weights, eq. 3, of a block's attention 'space', 'motion' or 'class', by its groups of tokens.

  Args:
    traced: the block, from `Model.trace`.
    name: of the attention.
    config: of the model.
  """
  patches, token = traced[name]
  places = _places(config)  # t n
  last = jnp.full((1, 1, 1), count_tokens(config) - 1)  # the class token, as `b h k`
  if name == 'class':
    heads = Heads(*(x[:, None] for x in patches))  # b 1 s h k
    return [Group(_weights(heads), heads.value, last[0], places.reshape(1, -1))]
  by_group = _by_frame if name == 'space' else motion_groups
  grouped = zip(*(by_group(x, config) for x in (*patches, places[None, ..., None, None])), strict=True)
  found = []
  for *region, numbers in grouped:  # b g s h k, and 1 g s 1 1
    heads = Heads(*region)
    if token is not None:
      heads = Heads(*(join(x, one) for x, one in zip(heads, token, strict=True)))  # b g s+1 h k
      numbers = join(numbers, last)
    members = numbers[0, :, :, 0, 0]  # g s
    found.append(Group(_weights(heads), heads.value, members, members))
  return found


def look(relevance: jax.Array, groups: Sequence[Group]) -> jax.Array:
  """What is read where these tokens are asked for: `relevance` times an attention's matrix, the mean of its heads.

  With 1 at a single token this is that token's own weights. The class token counts each of its groups the same, and a
  token that is no query stays itself.

  Args:
    relevance: `b tokens`, float32; see `count_tokens`.
    groups: of one attention.

  Returns:
    `b tokens`, with the same sum.
  """
  asks = jnp.zeros(relevance.shape[1]).at[jnp.concatenate([group.queries.ravel() for group in groups])].add(1)
  share = relevance / jnp.maximum(asks, 1)  # only the class token asks in several groups
  read = jnp.where(asks > 0, 0, relevance)
  for weights, _, queries, keys in groups:
    part = jnp.einsum('bgq,bghqs->bgs', share[:, queries], weights) / weights.shape[2]  # b g s
    read = read.at[:, keys].add(part)
  return read


def rollout(traced: Sequence[Traced], config: MEViTConfig) -> jax.Array:
  """Attention rollout (Abnar and Zuidema 2020) of the class token through all blocks, `b tokens`.

  Each attention, of space, motion or class, is half itself and half the residual connection; feed-forward networks mix
  no tokens. What stays with the class token is its own start: it is of no patch.
  """
  batch = jax.tree.leaves(traced[0])[0].shape[0]
  relevance = one_token(count_tokens(config) - 1, batch, config)
  for block in reversed(traced):
    for name in reversed(attentions_of(block, config)):
      relevance = (relevance + look(relevance, attention_groups(block, name, config))) / 2
  return relevance


def class_attention(block: Traced, config: MEViTConfig) -> jax.Array:
  """What the class token reads in a block's class attention, or in its space attention: `b tokens`."""
  groups = attention_groups(block, 'class' if 'class' in block else 'space', config)
  return look(one_token(count_tokens(config) - 1, groups[0].weights.shape[0], config), groups)


def attentions_of(block: Traced, config: MEViTConfig) -> list[str]:
  """A block's attentions in the order in which they come."""
  return [name for name in (*config.attentions, 'class') if name in block]


def one_token(number: int | jax.Array, batch: int, config: MEViTConfig) -> jax.Array:
  """1 at a token, `b tokens`."""
  one = jax.nn.one_hot(number, count_tokens(config))
  return jnp.broadcast_to(one, (batch, one.shape[0]))


def on_grid(relevance: jax.Array, config: MEViTConfig) -> jax.Array:
  """The patches of `b tokens`, as maps `b t rows columns`."""
  return relevance[:, :-1].reshape(-1, config.frames, *config.grid)  # b t rows columns


def kinds_of(config: MEViTConfig, block: int) -> list[Kind]:
  """The heat maps, as a name and a block: each attention's last block up to this one, and rollout through all."""
  first, last = config.space_blocks, config.space_blocks + config.motion_blocks
  upto = range(config.depth)[block]
  kinds: list[Kind] = []
  if last:
    kinds.append(('space', min(upto, last - 1)))
  if config.motion_blocks and upto >= first:
    kinds.append(('motion', min(upto, last - 1)))
  if upto >= last or not config.class_blocks:
    kinds.append(('class', upto))
  return [*kinds, ('rollout', config.depth - 1)]


def make_looks(
  model: Model, kinds: Sequence[Kind], query: Patch | None, normalization: Normalization
) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array, list[jax.Array]]]:
  """The function that looks.

  Args:
    model: to look into.
    kinds: of `kinds_of`.
    query: the patch whose weights are asked for; None is where a clip's rollout is largest.
    normalization: pixel mean and standard deviation.

  Returns:
    (params, video uint8 `b t h w 3`) -> logits `b classes`, the query `b 3`, and a map `b t rows columns` a kind.
  """
  config = model.config

  def looks(params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    pixels = normalize(video, normalization, config.dtype)
    traced = model.trace(params, pixels, slice(None))
    through = rollout(traced, config)  # b tokens
    chosen = through[:, :-1].argmax(1)  # b
    if query:
      frame, row, column = query
      chosen = jnp.full_like(chosen, (frame * config.grid[0] + row) * config.grid[1] + column)

    def weights(name: str, block: int) -> jax.Array:
      if name == 'rollout':
        return through
      if name == 'class':
        return class_attention(traced[block], config)
      groups = attention_groups(traced[block], name, config)
      return look(jax.nn.one_hot(chosen, count_tokens(config)), groups)

    maps = [on_grid(weights(*kind), config) for kind in kinds]  # each b t rows columns
    patches = jnp.stack(jnp.unravel_index(chosen, (config.frames, *config.grid)), axis=-1)  # b 3
    return model.apply(params, pixels), patches, maps

  return looks


def _weights(heads: Heads) -> jax.Array:
  """Of every query, over the keys: `b g h q s`, float32."""
  query, key = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in heads[:2])
  logits = jnp.einsum('bgqhk,bgshk->bghqs', query, key) * query.shape[-1] ** -0.5  # b g h q s
  return jax.nn.softmax(logits, axis=-1)


def _places(config: MEViTConfig) -> jax.Array:
  """The numbers of the patches, in block order: `t n`."""
  numbers = jnp.arange(count_tokens(config) - 1).reshape(config.frames, *config.grid, 1)  # t rows columns 1
  return to_block_order(numbers, config)[..., 0]  # t n


def _by_frame(x: jax.Array, config: MEViTConfig) -> list[jax.Array]:
  """Eq. 6: a frame is a group, `b t n h k`, as it stands."""
  del config
  return [x]
