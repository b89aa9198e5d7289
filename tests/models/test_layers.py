"""Layers with a gradient of their own, against the library's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mevit_jax.models.layers import WideLayerNorm


@pytest.mark.parametrize('shape', [(2, 3, 5, 16), (3, 8)])
def test_layer_norm_is_the_librarys(shape):
  rng, width = np.random.default_rng(0), shape[-1]
  x = jnp.asarray(rng.normal(1, 2, shape), jnp.float32)
  scale, bias, weights = jnp.asarray(rng.normal(size=(3, width)), jnp.float32)

  def loss(kind, scale, bias, x):
    layer = kind(width, epsilon=1e-3, use_fast_variance=False, rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = scale, bias
    return (layer(x) ** 2 * weights).sum()

  ours, wanted = (
    jax.tree.leaves(jax.value_and_grad(loss, argnums=(1, 2, 3))(kind, scale, bias, x))
    for kind in (WideLayerNorm, nnx.LayerNorm)
  )
  for one, other in zip(ours, wanted, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(np.abs(other).max()))
