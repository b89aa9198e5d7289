"""Layers of which the gradient, or the compiler, wants more than the library's have."""

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


def layer_norm(config: MEViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """LayerNorm over `d`; its statistics are float32.

  By E[x²] - E[x]², which XLA has for nothing beside the product before it, where tokens are bfloat16: what that loses
  is far below what they have lost. It is not for wider ones.
  """
  return nnx.LayerNorm(
    config.width,
    epsilon=config.layer_norm_eps,
    dtype=jnp.dtype(config.dtype),
    use_fast_variance=config.dtype == 'bfloat16',
    rngs=rngs,
  )
