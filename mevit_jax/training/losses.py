"""What training minimises, and what it counts on the way."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean cross-entropy of logits `b c` against distributions `b c`."""
  return optax.softmax_cross_entropy(logits, targets).mean()


def smooth_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
  """One-hot labels `b` -> `b c`, with a share `smoothing` spread over all classes (Szegedy et al. 2016)."""
  return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def count_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """How many of `b` labels are the largest logit; ties go to the lowest class."""
  return (jnp.argmax(logits, axis=-1) == labels).sum()
