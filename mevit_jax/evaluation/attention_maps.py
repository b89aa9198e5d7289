"""Attention maps of a clip, computed from the queries, keys and values that `Model.trace` returns."""

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
MapKind = tuple[str, int]  # 'space', 'motion', 'class' or 'rollout', and the index of the block


class AttentionGroup(NamedTuple):
  """Attention weights within groups of tokens, and the indices of these tokens.

  Patches are numbered by frame, row and column of the grid; then come the frame tokens by frame, and the class token.

  Attributes:
    weights: `b g h q s`, float32: softmax of each query over the keys.
    values: `b g s h k`.
    queries: token indices `g q`.
    keys: token indices `g s`.
  """

  weights: jax.Array
  values: jax.Array
  queries: jax.Array
  keys: jax.Array


def count_tokens(config: MEViTConfig) -> int:
  """Returns the number of patches and frame tokens in a clip plus one for the class token."""
  return config.frames * (config.patches + config.frame_tokens) + 1


def attention_groups(traced: Traced, name: str, config: MEViTConfig) -> list[AttentionGroup]:
  """Computes the attention weights (eq. 3) of one attention layer, by group of tokens.

  Args:
    traced: block, as returned by `Model.trace`.
    name: attention layer: 'space', 'motion' or 'class'.
    config: model config.
  """
  patches, token = traced[name]
  indices = _token_indices(config)  # t n+f
  class_index = jnp.full((1, 1, 1), count_tokens(config) - 1)  # b h k
  if name == 'class':
    heads = Heads(*(x[:, None] for x in patches))  # b 1 s h k
    keys = indices[:, : config.patches].reshape(1, -1)  # 1 t·n
    return [AttentionGroup(_attention_weights(heads), heads.value, class_index[0], keys)]
  group_patches = _group_by_frame if name == 'space' else motion_groups
  regions = zip(*(group_patches(x, config) for x in (*patches, indices[None, ..., None, None])), strict=True)
  groups = []
  for *region, region_indices in regions:  # b g s h k, and 1 g s 1 1
    heads = Heads(*region)
    if token is not None:
      heads = Heads(*(join(x, y) for x, y in zip(heads, token, strict=True)))  # b g s+1 h k
      region_indices = join(region_indices, class_index)
    members = region_indices[0, :, :, 0, 0]  # g s
    groups.append(AttentionGroup(_attention_weights(heads), heads.value, members, members))
  return groups


def propagate_relevance(relevance: jax.Array, groups: Sequence[AttentionGroup]) -> jax.Array:
  """Multiplies `relevance` by an attention matrix over all tokens, averaged over heads.

  With 1 at a single token, the result is the attention weights of that token. A class token that is a query in several
  groups averages over them; a token that is not a query keeps its relevance.

  Args:
    relevance: `b tokens`, float32; see `count_tokens`.
    groups: all groups of one attention layer.

  Returns:
    `b tokens`, with the same sum.
  """
  query_counts = jnp.zeros(relevance.shape[1]).at[jnp.concatenate([group.queries.ravel() for group in groups])].add(1)
  per_query = relevance / jnp.maximum(query_counts, 1)  # only the class token is a query in several groups
  output = jnp.where(query_counts > 0, 0, relevance)
  for weights, _, queries, keys in groups:
    update = jnp.einsum('bgq,bghqs->bgs', per_query[:, queries], weights) / weights.shape[2]  # b g s
    output = output.at[:, keys].add(update)
  return output


def attention_rollout(traced: Sequence[Traced], config: MEViTConfig) -> jax.Array:
  """Computes attention rollout (Abnar and Zuidema 2020) from the class token through all blocks, `b tokens`.

  Each space, motion or class attention contributes half and its residual connection half; MLPs do not mix tokens. The
  relevance that remains at the class token belongs to its embedding and to no patch.
  """
  batch = jax.tree.leaves(traced[0])[0].shape[0]
  relevance = class_relevance(batch, config)
  for block in reversed(traced):
    for name in reversed(attention_names(block, config)):
      relevance = (relevance + propagate_relevance(relevance, attention_groups(block, name, config))) / 2
  return relevance


def class_token_attention(block: Traced, config: MEViTConfig) -> jax.Array:
  """Returns the class token's weights in a block's class attention, else in its space attention: `b tokens`."""
  groups = attention_groups(block, 'class' if 'class' in block else 'space', config)
  return propagate_relevance(class_relevance(groups[0].weights.shape[0], config), groups)


def attention_names(block: Traced, config: MEViTConfig) -> list[str]:
  """Lists the attention layers of a block in order of execution."""
  return [name for name in (*config.attentions, 'class') if name in block]


def one_hot_relevance(token: int | jax.Array, batch: int, config: MEViTConfig) -> jax.Array:
  """Returns `b tokens` with 1 at one token and 0 elsewhere; `b t tokens` for an array `t` of tokens."""
  one_hot = jax.nn.one_hot(token, count_tokens(config))
  return jnp.broadcast_to(one_hot, (batch, *one_hot.shape))


def class_relevance(batch: int, config: MEViTConfig) -> jax.Array:
  """Returns `b tokens` with 1 at the class token, or 1 / t at those of the frames that replace it."""
  if config.has_class_token:
    return one_hot_relevance(count_tokens(config) - 1, batch, config)
  tokens = _token_indices(config)[:, config.patches]  # t
  return one_hot_relevance(tokens, batch, config).mean(axis=1)


def to_grid(relevance: jax.Array, config: MEViTConfig) -> jax.Array:
  """Drops all but the patches and reshapes `b tokens` to maps `b t rows columns`."""
  return relevance[:, : config.frames * config.patches].reshape(-1, config.frames, *config.grid)  # b t rows columns


def map_kinds(config: MEViTConfig, block: int) -> list[MapKind]:
  """Lists the maps to draw: the last layer of each kind up to `block`, and rollout through all blocks."""
  first_motion, end_motion = config.space_blocks, config.space_blocks + config.motion_blocks
  index = range(config.depth)[block]
  kinds: list[MapKind] = []
  if end_motion:
    kinds.append(('space', min(index, end_motion - 1)))
  if config.motion_blocks and index >= first_motion:
    kinds.append(('motion', min(index, end_motion - 1)))
  if index >= end_motion or not config.class_blocks:
    kinds.append(('class', index))
  return [*kinds, ('rollout', config.depth - 1)]


def make_attention_maps(
  model: Model, kinds: Sequence[MapKind], query: Patch | None, normalization: Normalization
) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array, list[jax.Array]]]:
  """Builds the function that computes attention maps.

  Args:
    model: model.
    kinds: maps to compute, from `map_kinds`.
    query: patch whose weights are computed; None is the patch with the largest rollout value of each clip.
    normalization: pixel mean and standard deviation.

  Returns:
    (params, video uint8 `b t h w 3`) -> logits `b classes`, query patch `b 3`, one map `b t rows columns` per kind.
  """
  config = model.config

  def attention_maps(params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    pixels = normalize(video, normalization, config.dtype)
    traced = model.trace(params, pixels, slice(None))
    rollout = attention_rollout(traced, config)  # b tokens
    query_index = rollout[:, : config.frames * config.patches].argmax(1)  # b
    if query:
      frame, row, column = query
      query_index = jnp.full_like(query_index, (frame * config.grid[0] + row) * config.grid[1] + column)

    def relevance(name: str, block: int) -> jax.Array:
      if name == 'rollout':
        return rollout
      if name == 'class':
        return class_token_attention(traced[block], config)
      groups = attention_groups(traced[block], name, config)
      return propagate_relevance(jax.nn.one_hot(query_index, count_tokens(config)), groups)

    maps = [to_grid(relevance(*kind), config) for kind in kinds]  # b t rows columns
    patches = jnp.stack(jnp.unravel_index(query_index, (config.frames, *config.grid)), axis=-1)  # b 3
    return model.apply(params, pixels), patches, maps

  return attention_maps


def _attention_weights(heads: Heads) -> jax.Array:
  """Computes the softmax of each query over the keys: `b g h q s`, float32."""
  query, key = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in heads[:2])
  logits = jnp.einsum('bgqhk,bgshk->bghqs', query, key) * query.shape[-1] ** -0.5  # b g h q s
  return jax.nn.softmax(logits, axis=-1)


def _token_indices(config: MEViTConfig) -> jax.Array:
  """Returns the token indices of the patches, in block order, and of the frame tokens behind them: `t n+f`."""
  indices = jnp.arange(config.frames * config.patches).reshape(config.frames, *config.grid, 1)  # t rows columns 1
  frame_tokens = jnp.arange(indices.size, count_tokens(config) - 1).reshape(config.frames, -1)  # t f
  return jnp.concatenate([to_block_order(indices, config)[..., 0], frame_tokens], axis=1)  # t n+f


def _group_by_frame(x: jax.Array, config: MEViTConfig) -> list[jax.Array]:
  """Groups patches `b t n h k` by frame (eq. 6), which is their layout already."""
  del config
  return [x]
