"""Layout changes between the tensors of other libraries and parameters, in both directions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, ...]
Tensors = tuple[np.ndarray | None, ...]  # None: an extra tensor that the source does not have


class Sizes(NamedTuple):
  """Sizes that shapes of tensors do not state.

  Attributes:
    heads: number of attention heads.
    patches: number of patches in the source's images; None if it does not state it, which means a square of them.
  """

  heads: int
  patches: int | None = None


class Transform(NamedTuple):
  """Layout change of a rule's arrays: `forward(tensors, sizes) -> params` and `inverse(params) -> tensors`.

  `forward` raises a ValueError for shapes that it cannot convert. `inverse` returns None for extra tensors that the
  parameters do not need.
  """

  forward: Callable[[Any, Sizes], Arrays]
  inverse: Callable[[Arrays], Tensors]


def _single(forward: Callable[[np.ndarray, int], np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]) -> Transform:
  """Returns the transform of a single array; `forward` takes the number of heads."""
  return Transform(lambda tensors, sizes: (forward(tensors[0], sizes.heads),), lambda params: (inverse(params[0]),))


def _with_bias(kernel: Transform, bias: Transform, parts: int = 1) -> Transform:
  """Returns the transform of a weight of so many parts, and of its bias, which is zero if the source has none."""

  def forward(tensors: Tensors, sizes: Sizes) -> Arrays:
    weight, vector = tensors
    assert weight is not None
    vector = np.zeros(weight.shape[0], weight.dtype) if vector is None else vector
    return *kernel.forward((weight,), sizes), *bias.forward((vector,), sizes)

  return Transform(forward, lambda params: (*kernel.inverse(params[:parts]), *bias.inverse(params[parts:])))


def _split(transform: Transform, count: int) -> Transform:
  """Returns the transform of parts that are concatenated in one tensor."""
  return Transform(
    lambda tensors, sizes: tuple(transform.forward((part,), sizes)[0] for part in np.split(tensors[0], count)),
    lambda params: (np.concatenate([transform.inverse((param,))[0] for param in params]),),
  )


def _squeeze(x: np.ndarray, _: int) -> np.ndarray:
  if x.size != x.shape[-1]:
    raise ValueError('more than one token')
  return x.reshape(-1)


def _split_positions(tensors: Tensors, sizes: Sizes) -> Arrays:
  """Splits `1 1+n d` (or `1+n d`) into the class token's position and those of the patches.

  Without a class token's position (`1 n d`: no class token, or timm's `no_embed_class`), it is zero.
  """
  positions = tensors[0]
  if positions is None or positions.ndim not in (2, 3) or (positions.ndim == 3 and len(positions) != 1):
    raise ValueError('positions must be 1 1+n d, or 1+n d')
  positions = positions.reshape(-1, positions.shape[-1])
  count = len(positions)
  patches = sizes.patches or 0
  if count - patches not in (0, 1):  # not stated, or another default
    patches = count if math.isqrt(count) ** 2 == count else count - 1
  first = positions[0] if count > patches else np.zeros_like(positions[0])
  return first, positions[count - patches :]


def _scale(transform: Transform) -> Transform:
  """Returns the transform of a weight and a bias whose output is multiplied by a third tensor, LayerScale's gamma.

  LayerScale (Touvron et al. 2021) is folded into the layer before it, exactly: (W x + b) * gamma.
  """

  def forward(tensors: Tensors, sizes: Sizes) -> Arrays:
    weight, bias, gamma = tensors
    assert weight is not None
    assert bias is not None
    if gamma is not None:
      scale = np.asarray(gamma, np.float32).reshape(-1)
      weight, bias = weight.astype(np.float32) * scale[:, None], bias.astype(np.float32) * scale
    return *transform.forward((weight,), sizes), bias

  return Transform(forward, lambda params: (*transform.inverse(params[:1]), params[1], None))


def _fold_attention_pool(tensors: Tensors, sizes: Sizes) -> Arrays:
  """Converts the query of an attention pool (SigLIP's head) to class token, query kernel and query bias.

  The pool's query is W probe + b, without a norm and without a residual connection. A class block computes
  W norm(token) + b and adds the token: with a token of zeros its norm is the norm's bias, and b absorbs the difference.
  """
  probe, weight, bias, norm_bias = (np.asarray(x, np.float32) for x in tensors)
  probe = _squeeze(probe, 0)
  bias = (bias + weight.astype(np.float64) @ (probe.astype(np.float64) - norm_bias)).astype(np.float32)
  return np.zeros_like(probe), *HEADS_WITH_BIAS.forward((weight, bias), sizes)


def _first_third(tensors: Any, sizes: Sizes) -> Arrays:
  """Converts an attention pool's query from fused queries, keys and values."""
  probe, weight, bias, norm_bias = tensors
  return _fold_attention_pool((probe, np.split(weight, 3)[0], np.split(bias, 3)[0], norm_bias), sizes)


def _last_thirds(tensors: Any, sizes: Sizes) -> Arrays:
  """Converts keys and values from fused queries, keys and values: two kernels, two biases."""
  return KEY_VALUE.forward(tuple(np.concatenate(np.split(x, 3)[1:]) for x in tensors), sizes)


def _without_key_bias(tensors: Tensors, sizes: Sizes) -> Arrays:
  """Converts fused queries, keys and values with separate biases of queries and values: a key bias of zero."""
  weight, query, value = tensors
  bias = None if query is None or value is None else np.concatenate([query, np.zeros_like(query), value])
  return QKV.forward((weight, bias), sizes)


def read_only(forward: Callable[[Any, Sizes], Arrays]) -> Transform:
  """Returns the transform of a format that weights are not exported to."""

  def inverse(params: Arrays) -> Tensors:
    raise NotImplementedError('weights are not exported to this format')

  return Transform(forward, inverse)


IDENTITY = _single(lambda x, h: x, lambda x: x)
TOKEN = _single(_squeeze, lambda x: x[None, None])  # 1 1 d -> d
TOKENS = _single(lambda x, h: x.reshape(-1, x.shape[-1]), lambda x: x[None])  # 1 r d -> r d
LINEAR = _single(lambda x, h: x.T, lambda x: x.T)  # out in -> in out
CONV = _single(lambda x, h: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # d 3 ph pw -> ph pw 3 d
HEADS = _single(  # h·k d -> d h k
  lambda x, h: x.T.reshape(x.shape[1], h, -1), lambda x: x.reshape(x.shape[0], -1).T
)
HEADS_BIAS = _single(lambda x, h: x.reshape(h, -1), lambda x: x.reshape(-1))  # h·k -> h k
OUT_PROJECTION = _single(  # d h·k -> h k d
  lambda x, h: x.T.reshape(h, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T
)
QKV = _with_bias(_split(HEADS, 3), _split(HEADS_BIAS, 3), parts=3)
KEY_VALUE = _with_bias(_split(HEADS, 2), _split(HEADS_BIAS, 2), parts=2)
CONV_WITH_BIAS = _with_bias(CONV, IDENTITY)
HEADS_WITH_BIAS = _with_bias(HEADS, HEADS_BIAS)
SCALED_OUT_PROJECTION, SCALED_LINEAR = _scale(OUT_PROJECTION), _scale(LINEAR)
POSITIONS = Transform(  # 1 1+n d, or 1+n d -> d, n d
  _split_positions, lambda params: (np.concatenate([params[0][None], params[1]])[None],)
)
TIME_POSITIONS = _single(lambda x, h: x.reshape(x.shape[-2:]), lambda x: x[None])  # 1 t d -> t d
QKV_WITHOUT_KEY_BIAS = read_only(_without_key_bias)
POOL_QUERY, FUSED_POOL_QUERY, FUSED_KEY_VALUE = map(read_only, (_fold_attention_pool, _first_third, _last_thirds))
