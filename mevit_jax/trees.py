"""Names of the arrays in a tree, and access by name."""

from typing import Any

import jax


def path_name(path: tuple) -> str:
  """Returns the name of an array by its path in a tree, as 'motion/blocks/mlp/up/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def get_by_name(tree: dict[str, Any], name: str) -> Any:
  """Returns the array or subtree of a nested dict with a name such as 'motion/blocks/mlp/up/kernel'."""
  for part in name.split('/'):
    tree = tree[part]
  return tree


def set_by_name(tree: dict[str, Any], name: str, value: Any) -> None:
  """Sets an array of a nested dict by its name; creates the dicts on its path."""
  *parents, last = name.split('/')
  for part in parents:
    tree = tree.setdefault(part, {})
  tree[last] = value
