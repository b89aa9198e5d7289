"""Layers against those of flax: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mevit_jax.models.layers import add_bias, gelu, normalize

RNG = np.random.default_rng(0)
X, GRADIENT = RNG.normal(1.0, 3.0, (2, 3, 5, 16)), RNG.normal(size=(2, 3, 5, 16))
SCALE, BIAS = RNG.normal(size=16), RNG.normal(size=16)


def standard(x, scale, bias):
  return jax.nn.standardize(x, axis=-1, epsilon=1e-6) * scale + bias


PAIRS = {
  'gelu': (gelu, lambda x: jax.nn.gelu(x, approximate=False), (X,)),
  'bias': (add_bias, lambda x, bias: x + bias, (X, BIAS)),
  'norm': (lambda *args: normalize(*args, 1e-6), standard, (X, SCALE, BIAS)),
}


def values_and_gradients(function, arguments, dtype):
  output, back = jax.vjp(function, *(jnp.asarray(x, dtype) for x in arguments))
  return [np.asarray(x, np.float64) for x in (output, *back(jnp.asarray(GRADIENT, output.dtype)))]


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float64', 1e-13), ('float32', 3e-6), ('bfloat16', 2e-2)])
@pytest.mark.parametrize('name', PAIRS)
def test_layers_equal_those_of_flax(name, dtype, tolerance):
  ours, theirs, arguments = PAIRS[name]
  with jax.enable_x64():
    found, expected = values_and_gradients(ours, arguments, dtype), values_and_gradients(theirs, arguments, 'float64')
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())
