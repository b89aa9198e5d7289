"""Names of the arrays in a tree."""

import jax


def path_name(path: tuple) -> str:
  """Returns the name of an array by its path in a tree, as 'motion/blocks/mlp/up/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
