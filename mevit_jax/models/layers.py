"""Linear layers, activations and LayerNorm whose gradients need less memory or compile faster than the library's."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mevit_jax.config.model import MEViTConfig
from mevit_jax.models.platforms import sum_over_tokens


def linear(layer: nnx.Linear | nnx.LinearGeneral, x: jax.Array) -> jax.Array:
  """Applies a linear layer, `... i` -> `... o`, with the heads of its kernel (`d h k` or `h k d`) concatenated."""
  assert layer.bias is not None
  kernel, bias = layer.kernel[...].astype(x.dtype), layer.bias[...].astype(x.dtype)
  return add_bias(x @ kernel.reshape(x.shape[-1], -1), bias.reshape(-1))


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds `d` to `... d`; the gradient uses the fastest sum of the platform."""
  return x + bias


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
  return add_bias(x, bias), None


def _add_bias_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gradient, sum_over_tokens(gradient)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Computes the exact GELU, x Φ(x), in at least float32.

  Uses erf, because erfc takes the TPU compiler 40 s longer per block. The backward pass saves only `x`: a scan over
  blocks would otherwise save float32 intermediates.
  """
  x32 = _upcast(x)
  return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  x32 = _upcast(x)
  density = jnp.exp(-0.5 * x32**2) * (2 * math.pi) ** -0.5
  return (((_normal_cdf(x32) + x32 * density) * gradient).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.checkpoint
def gelu_tanh(x: jax.Array) -> jax.Array:
  """Computes the tanh approximation of GELU (SigLIP's 'gelu_pytorch_tanh'), in at least float32."""
  return jax.nn.gelu(_upcast(x), approximate=True).astype(x.dtype)


@jax.checkpoint
def quick_gelu(x: jax.Array) -> jax.Array:
  """Computes x sigmoid(1.702 x), the approximation of GELU in CLIP, in at least float32."""
  x32 = _upcast(x)
  return (x32 * jax.nn.sigmoid(1.702 * x32)).astype(x.dtype)


# Activations by their name in `MEViTConfig.activation`.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': gelu,
  'gelu_tanh': gelu_tanh,
  'quick_gelu': quick_gelu,
}


def _normal_cdf(x: jax.Array) -> jax.Array:
  """Computes Φ, the CDF of the normal distribution."""
  return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _upcast(x: jax.Array) -> jax.Array:
  """Converts to at least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(nnx.LayerNorm):
  """LayerNorm over `d`; the backward pass saves only the tokens and their statistics (see `gelu`)."""

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    assert mask is None
    assert self.scale is not None
    assert self.bias is not None
    return normalize(x, self.scale[...], self.bias[...], self.epsilon)


def layer_norm(config: MEViTConfig, rngs: nnx.Rngs) -> LayerNorm:
  """Builds the LayerNorm of a config."""
  return LayerNorm(config.width, epsilon=config.layer_norm_eps, rngs=rngs)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
  """Normalizes `... d` to zero mean and unit variance, then applies scale and bias `d`, in at least float32.

  The variance of bfloat16 tokens is E[x²] - E[x]², which XLA fuses into the preceding matrix product: the loss of
  precision is far below that of bfloat16.
  """
  return _normalize_forward(x, scale, bias, eps)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float):
  x32 = _upcast(x)
  mean = x32.mean(axis=-1, keepdims=True)
  if x.dtype == jnp.bfloat16:
    variance = jnp.maximum((x32**2).mean(axis=-1, keepdims=True) - mean**2, 0)
  else:
    variance = ((x32 - mean) ** 2).mean(axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + eps)
  return ((x32 - mean) * inverse * scale + bias).astype(x.dtype), (x, scale, mean, inverse)


def _normalize_backward(eps: float, residuals: tuple, gradient: jax.Array) -> tuple[jax.Array, ...]:
  del eps
  x, scale, mean, inverse = residuals
  unit, gradient32 = (_upcast(x) - mean) * inverse, _upcast(gradient)
  tokens = tuple(range(x.ndim - 1))
  scaled = gradient32 * scale
  projection = (scaled * unit).mean(axis=-1, keepdims=True)
  input_gradient = inverse * (scaled - scaled.mean(axis=-1, keepdims=True) - unit * projection)
  sums = ((gradient32 * unit).sum(axis=tokens), gradient32.sum(axis=tokens))  # d
  return input_gradient.astype(x.dtype), *(x.astype(scale.dtype) for x in sums)


normalize.defvjp(_normalize_forward, _normalize_backward)
