"""Literal implementation of the paper in float64: one clip, one token at a time, tokens keyed by position."""

import math

import jax
import numpy as np

CLASS = 'class token'  # the paper's (0, 0); a patch is (row, column, frame)


def forward(config, params, video, traces=None):
  """Runs the model on a clip `t h w 3`; returns {position: token `d`} of the patches, the class token `d`, the logits.

  Appends to the list `traces`, per block, a dict of the {position: `h k`} of queries, keys and values by attention.
  """
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  z = embed(config, params['embedding'], np.asarray(video, np.float64))
  start = params['class_token'] + params['class_position']
  if config.class_blocks == 0:
    z[CLASS] = start
  orders = {
    'space': ['space'],
    'motion': ['space', 'motion'] if config.attention_order == 'space_time' else ['motion', 'space'],
    'class': ['class'],
  }
  depths = (config.space_blocks, config.motion_blocks, config.class_blocks)
  for (stage, order), depth in zip(orders.items(), depths, strict=True):
    if stage == 'class' and depth:
      z[CLASS] = start
    for i in range(depth):
      block = jax.tree.map(lambda x, i=i: x[i], params[stage]['blocks'])
      traced = {}
      for kind in order:  # residual connections of eq. 5
        new = attention(config, kind, block[f'{kind}_attention'], z, traced)
        z = {x: z[x] + new[x] if x in new else z[x] for x in z}
      if traces is not None:
        traces.append(traced)
      changes = [CLASS] if stage == 'class' else z
      z = {x: z[x] + ffn(config, block['mlp'], z[x]) if x in changes else z[x] for x in z}
  token = z.pop(CLASS)
  return z, token, linear(params['head'], layer_norm(config, params['norm'], token))  # eq. 9


def embed(config, p, video):
  """Embeds a clip by eq. 1, with e(p, t) = e_space(p) + e_time(t)."""
  (rows, columns), (height, width) = config.grid, config.patch_size
  z = {}
  for t in range(config.frames):
    for row in range(rows):
      for column in range(columns):
        top, left = row * height, column * width
        pixels = video[t, top : top + height, left : left + width]
        z[row, column, t] = (
          np.sum(p['kernel'] * pixels[..., None], axis=(0, 1, 2)) + p['bias'] + p['space'][row, column] + p['time'][t]
        )
  return z


def attention(config, kind, p, z, traced):
  """Computes the update of each query by eqs. 2, 6, 8, 10, 4 and W_O of 5."""
  size = config.block_size
  group = {
    'space': lambda row, column, t: t,  # eq. 6: the query's frame
    'motion': lambda row, column, t: (row // size, column // size),  # eq. 8: the query's block B
    'class': lambda row, column, t: 'all',  # eq. 10
  }[kind]
  patches = [x for x in z if x != CLASS]
  joins = CLASS in z and (kind != 'motion' or config.class_token_in_motion)
  token = [CLASS] if joins else []
  normed = {x: layer_norm(config, p['norm'], z[x]) for x in patches + token}
  q, k, v = (
    {x: np.einsum('d,dhk->hk', normed[x], p[name]['kernel']) + p[name]['bias'] for x in normed}
    for name in ('query', 'key', 'value')
  )

  traced[kind] = q, k, v

  def read(query, position):
    same = [x for x in patches if group(*x) == position]
    return attend(q[query], k, v, same if kind == 'class' else token + same)

  new = {} if kind == 'class' else {x: read(x, group(*x)) for x in patches}
  if joins:  # a query of every group; groups are averaged
    new[CLASS] = np.mean([read(CLASS, position) for position in {group(*x) for x in patches}], axis=0)
  return {x: np.einsum('hk,hkd->d', new[x], p['out']['kernel']) + p['out']['bias'] for x in new}


def attend(q, k, v, positions):
  """Computes eqs. 3 and 4 for one query `h k` over the keys at `positions`, head by head: `h k`."""
  s = np.zeros_like(q)
  for a in range(len(q)):
    logits = np.array([q[a] @ k[x][a] / math.sqrt(len(q[a])) for x in positions])
    alpha = np.exp(logits - logits.max())
    alpha /= alpha.sum()
    s[a] = sum(weight * v[x][a] for weight, x in zip(alpha, positions, strict=True))
  return s


def ffn(config, p, x):
  hidden = linear(p['up'], layer_norm(config, p['norm'], x))
  gelu = np.array([u * (1 + math.erf(u / math.sqrt(2))) / 2 for u in hidden])
  return linear(p['down'], gelu)


def layer_norm(config, p, x):
  normed = (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + config.layer_norm_eps)
  return normed * p['scale'] + p['bias']


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def random_params(model, seed=0):
  """Random values for every parameter, by its name: constant initializations hide swapped parameters."""

  def draw(path, x):
    rng = np.random.default_rng([seed, *jax.tree_util.keystr(path).encode()])
    return (0.5 * rng.standard_normal(x.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, model.abstract)


def random_video(config, batch=2, seed=0):
  """Random normalized clips `b t h w 3`."""
  shape = (batch, config.frames, *config.image_size, 3)
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected, tolerance):
  """Compares two trees; the tolerance is relative to the largest number of each array."""
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(
      np.asarray(a, np.float64), e, rtol=0, atol=tolerance * np.abs(np.asarray(e)).max()
    ),
    actual,
    expected,
  )
