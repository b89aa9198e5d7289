"""Loss and accuracy of training."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Computes the mean cross-entropy of logits `b c` and target distributions `b c`."""
  return optax.softmax_cross_entropy(logits, targets).mean()


def smooth_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
  """Converts labels `b` to one-hot targets `b c` with label smoothing (Szegedy et al. 2016)."""
  return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def count_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Counts correct predictions; ties go to the lowest class."""
  return (jnp.argmax(logits, axis=-1) == labels).sum()
