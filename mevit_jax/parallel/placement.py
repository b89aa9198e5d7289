"""Where arrays live: parameters by rules over their paths, batches by rows. Models know no mesh."""

import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# (regular expression over a parameter's path, its partition): the first that matches (re.search) holds.
Rules = Sequence[tuple[str, PartitionSpec]]

REPLICATED: Rules = (('', PartitionSpec()),)


def place(tree, mesh: Mesh, rules: Rules = REPLICATED):
  """The sharding of every array of a tree; a path that no rule matches is an error."""

  def sharding(path, _) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for pattern, spec in rules:
      if re.search(pattern, name):
        return NamedSharding(mesh, spec)
    raise ValueError(f'no placement rule matches {name}')

  return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(abstract, mesh: Mesh, rules: Rules = REPLICATED):
  """Shapes and dtypes with their places: the target of a restore."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    abstract,
    place(abstract, mesh, rules),
  )


def by_rows(mesh: Mesh) -> NamedSharding:
  """A batch's sharding: its rows over the data axis."""
  return NamedSharding(mesh, PartitionSpec('data'))
