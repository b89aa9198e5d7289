"""Layers of which the gradient, or the compiler, wants more than the library's have."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.models.config import MEViTConfig
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


def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x Φ(x), in float32 at least; by erf: by erfc it takes 40 s more of a TPU's compiler a block."""
  wide = x.astype(jnp.promote_types(x.dtype, 'float32'))
  return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class WideLayerNorm(nnx.LayerNorm):
  """LayerNorm over `d` in float32 or wider, by the textbook's gradient."""

  def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # no mask
    assert self.scale is not None
    assert self.bias is not None
    x = x.astype(self.dtype)
    return normalised(x, self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype), self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalised(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """LayerNorm, `... d`, scaled and shifted by `d`; the derivative of its own steps is slower on CPUs."""
  return _normalised_forward(x, scale, bias, epsilon)[0]


def _normalised_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float):
  mean = x.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon)  # of the deviation, ... 1
  return (x - mean) * (inverse * scale) + bias, (x, mean, inverse, scale)


def _normalised_backward(epsilon: float, kept: tuple[jax.Array, ...], gradient: jax.Array):
  del epsilon
  x, mean, inverse, scale = kept
  unit, scaled, tokens = (x - mean) * inverse, gradient * scale, tuple(range(x.ndim - 1))
  along = unit * (scaled * unit).mean(-1, keepdims=True)
  of_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - along)
  return of_x, (gradient * unit).sum(tokens), gradient.sum(tokens)


normalised.defvjp(_normalised_forward, _normalised_backward)


def layer_norm(config: MEViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """LayerNorm over `d`; its statistics are float32 at least.

  Of bfloat16 tokens by E[x²] - E[x]², which XLA has for nothing beside the product before it: what that loses is far
  below what they have lost. It is not for wider ones.
  """
  width, epsilon, dtype = config.width, config.layer_norm_eps, jnp.dtype(config.dtype)
  if config.dtype == 'bfloat16':
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, use_fast_variance=True, rngs=rngs)
  return WideLayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
