"""Layers of which the gradient, or the compiler, wants more than the library's have."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.platforms import sum_over_tokens


def linear(layer: nnx.Linear | nnx.LinearGeneral, x: jax.Array) -> jax.Array:
  """A linear layer, `... i` -> `... o`; the heads that its kernel may have, `d h k` or `h k d`, stand side by side."""
  assert layer.bias is not None
  kernel, bias = layer.kernel[...].astype(x.dtype), layer.bias[...].astype(x.dtype)
  return add_bias(x @ kernel.reshape(x.shape[-1], -1), bias.reshape(-1))


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """`... d` plus `d`; its gradient is summed as the platform does it fastest."""
  return x + bias


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
  return add_bias(x, bias), None


def _add_bias_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gradient, sum_over_tokens(gradient)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x Φ(x), in float32 at least; by erf: by erfc a TPU's compiler takes 40 s more for every block.

  Backwards has `x` alone: a loop over blocks would keep what is between in float32.
  """
  wide = _wide(x)
  return (wide * _normal(wide)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  wide = _wide(x)
  density = jnp.exp(-0.5 * wide**2) * (2 * math.pi) ** -0.5
  return (((_normal(wide) + wide * density) * gradient).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal(x: jax.Array) -> jax.Array:
  """Φ, the normal distribution's."""
  return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _wide(x: jax.Array) -> jax.Array:
  """As float32, or float64 as it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(nnx.LayerNorm):
  """LayerNorm over `d`, of which backwards has the tokens and their statistics alone (see `gelu`)."""

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    assert mask is None
    assert self.scale is not None
    assert self.bias is not None
    return normalised(x, self.scale[...], self.bias[...], self.epsilon)


def layer_norm(config: MEViTConfig, rngs: nnx.Rngs) -> LayerNorm:
  """The LayerNorm of a config."""
  return LayerNorm(config.width, epsilon=config.layer_norm_eps, rngs=rngs)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalised(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
  """`... d` less its mean, over its deviation, times and plus `d`; all in float32 at least.

  The variance of bfloat16 tokens is E[x²] - E[x]², which XLA has beside the product before it for nothing: what that
  loses is far below what such tokens have lost already.
  """
  return _normalised_forward(x, scale, bias, eps)[0]


def _normalised_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float):
  wide = _wide(x)
  mean = wide.mean(axis=-1, keepdims=True)
  if x.dtype == jnp.bfloat16:
    variance = jnp.maximum((wide**2).mean(axis=-1, keepdims=True) - mean**2, 0)
  else:
    variance = ((wide - mean) ** 2).mean(axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + eps)
  return ((wide - mean) * inverse * scale + bias).astype(x.dtype), (x, scale, mean, inverse)


def _normalised_backward(eps: float, kept: tuple, gradient: jax.Array) -> tuple[jax.Array, ...]:
  del eps
  x, scale, mean, inverse = kept
  unit, wide = (_wide(x) - mean) * inverse, _wide(gradient)
  tokens = tuple(range(x.ndim - 1))
  scaled = wide * scale
  along = (scaled * unit).mean(axis=-1, keepdims=True)
  back = inverse * (scaled - scaled.mean(axis=-1, keepdims=True) - unit * along)
  sums = ((wide * unit).sum(axis=tokens), wide.sum(axis=tokens))  # d
  return back.astype(x.dtype), *(one.astype(scale.dtype) for one in sums)


normalised.defvjp(_normalised_forward, _normalised_backward)
