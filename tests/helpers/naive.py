"""Literal implementation of the paper in float64: one clip, one token at a time, tokens keyed by position."""

import math

import jax
import numpy as np

CLASS = 'class token'  # the paper's (0, 0); the key of a patch is (row, column, frame)
FRAME_TOKEN = 'frame token'  # the key of frame token i is (FRAME_TOKEN, i, frame)


def forward(config, params, video, traces=None):
  """Runs the model on a clip `t h w 3`; returns {position: token `d`} of the patches, the class token `d`, the logits.

  Frame tokens without class blocks: the first of each frame, `t d`, instead of the class token.

  Appends to the list `traces`, per block, a dict of the {position: `h k`} of queries, keys and values by attention.
  """
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  z = embed(config, params['embedding'], np.asarray(video, np.float64))
  for i in range(config.frame_tokens):
    z |= {(FRAME_TOKEN, i, t): params['frame_tokens'][i] for t in range(config.frames)}
  first_norm = (lambda x: layer_norm(config, params['pre_norm'], x)) if config.pre_norm else lambda x: x
  z = {x: first_norm(z[x]) for x in z}
  replaced = config.frame_tokens > 0 and config.class_blocks == 0
  start = None if replaced else first_norm(params['class_token'] + params['class_position'])
  if config.class_blocks == 0 and not replaced:
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
  patches = {x: z[x] for x in z if x != CLASS and x[0] != FRAME_TOKEN}
  tokens = [z[FRAME_TOKEN, 0, t] for t in range(config.frames)] if replaced else [z[CLASS]]
  logits = np.mean([linear(params['head'], layer_norm(config, params['norm'], x)) for x in tokens], axis=0)  # eq. 9
  return patches, np.stack(tokens) if replaced else tokens[0], logits


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
  patches = [x for x in z if x != CLASS and (kind == 'space' or x[0] != FRAME_TOKEN)]
  joins = CLASS in z and (kind != 'motion' or config.class_token_in_motion)
  token = [CLASS] if joins else []
  normed = {x: layer_norm(config, p['norm'], z[x]) for x in patches + token}
  q, k, v = (
    {x: np.einsum('d,dhk->hk', normed[x], p[name]['kernel']) + p[name]['bias'] for x in normed}
    for name in ('query', 'key', 'value')
  )
  for heads in (q, k) if config.rotary_theta else ():
    heads.update({x: rotate(config, heads[x], *x[:2]) for x in patches if x[0] != FRAME_TOKEN})

  traced[kind] = q, k, v

  def read(query, position):
    same = [x for x in patches if group(*x) == position]
    return attend(q[query], k, v, same if kind == 'class' else token + same)

  new = {} if kind == 'class' else {x: read(x, group(*x)) for x in patches}
  if joins:  # a query of every group; groups are averaged
    new[CLASS] = np.mean([read(CLASS, position) for position in {group(*x) for x in patches}], axis=0)
  return {x: np.einsum('hk,hkd->d', new[x], p['out']['kernel']) + p['out']['bias'] for x in new}


def rotate(config, heads, row, column):
  """Rotates the queries or keys `h k` of a patch as complex numbers: by its row, then by its column."""
  quarter = heads.shape[-1] // 4
  places = [2 * (i + 0.5) / size - 1 for i, size in zip((row, column), config.grid, strict=True)]
  angles = np.array([2 * np.pi * x * config.rotary_theta ** (-j / quarter) for x in places for j in range(quarter)])
  rotated = (heads[:, : 2 * quarter] + 1j * heads[:, 2 * quarter :]) * np.exp(1j * angles)
  return np.concatenate([rotated.real, rotated.imag], axis=-1)


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
  activation = {
    'gelu': lambda u: u * (1 + math.erf(u / math.sqrt(2))) / 2,
    'gelu_tanh': lambda u: u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) / 2,
    'quick_gelu': lambda u: u / (1 + math.exp(-1.702 * u)),
  }[config.activation]
  return linear(p['down'], np.array([activation(u) for u in hidden]))


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
