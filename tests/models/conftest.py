"""What the tests of the model share."""

import jax
import pytest


@pytest.fixture(autouse=True)
def exact_and_fast():
  """Full digits (accelerators round float32 factors unless told not to), and half the compilation time."""
  jax.config.update('jax_disable_most_optimizations', True)
  with jax.default_matmul_precision('highest'):
    yield
  jax.config.update('jax_disable_most_optimizations', False)
