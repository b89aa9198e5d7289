"""64-bit arithmetic for references."""

import jax
from jax import experimental

# jax.enable_x64 since jax 0.8, jax.experimental.enable_x64 before.
enable_x64 = jax.enable_x64 if hasattr(jax, 'enable_x64') else experimental.enable_x64
