"""Where arrays live: parameters by rules over their paths, batches by rows. Models know no mesh."""

import math
import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mevit_jax.errors import UserError
from mevit_jax.parallel.mesh import BATCH_AXES
from mevit_jax.trees import path_name

# (regular expression over a parameter's path, its partition): the first that matches (re.search) holds.
Rules = Sequence[tuple[str, PartitionSpec]]

REPLICATED: Rules = (('', PartitionSpec()),)

# A model's parameters, and what an optimiser keeps of each under the same path. Blocks are stacked along the first
# axis, which is never cut: every device works on every block. What no rule names is small: biases, norms, tokens.
PARAMETERS: Rules = (
  (r'(query|key|value)/kernel$', PartitionSpec(None, 'fsdp', 'tensor', None)),  # blocks d h k
  (r'(query|key|value)/bias$', PartitionSpec(None, 'tensor', None)),  # blocks h k
  (r'out/kernel$', PartitionSpec(None, 'tensor', None, 'fsdp')),  # blocks h k d
  (r'mlp/up/kernel$', PartitionSpec(None, 'fsdp', 'tensor')),  # blocks d hidden
  (r'mlp/up/bias$', PartitionSpec(None, 'tensor')),  # blocks hidden
  (r'mlp/down/kernel$', PartitionSpec(None, 'tensor', 'fsdp')),  # blocks hidden d
  (r'embedding/kernel$', PartitionSpec(None, None, None, 'fsdp')),  # ph pw 3 d
  (r'embedding/space$', PartitionSpec(None, None, 'fsdp')),  # rows columns d
  (r'head/kernel$', PartitionSpec('fsdp', None)),  # d classes
  *REPLICATED,
)


def place(tree, mesh: Mesh, rules: Rules = PARAMETERS):
  """The sharding of every array of a tree; a path that no rule matches is an error.

  Raises:
    UserError: an axis of the mesh does not divide what it is to cut.
  """

  def sharding(path, leaf) -> NamedSharding:
    name = path_name(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        _check_divides(name, leaf.shape, mesh, spec)
        return NamedSharding(mesh, spec)
    raise ValueError(f'no placement rule matches {name}')

  return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(abstract, mesh: Mesh, rules: Rules = PARAMETERS):
  """Shapes and dtypes with their places: the target of a restore."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    abstract,
    place(abstract, mesh, rules),
  )


def put(tree, mesh: Mesh, rules: Rules = PARAMETERS):
  """Host arrays on the devices, where the rules want them: a device, of any host, gets its own part and no more."""
  return jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
    tree,
    place(tree, mesh, rules),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """A batch's sharding: its rows over the slice, data and fsdp axes, and whole over the tensor axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain_batch(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """A function for a model to put its activations through: they stay by rows, so that weights come to them.

  Without it the partitioner, which sees a width that is cut in the weights, may gather activations instead.
  """
  return lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def shard_attention(mesh: Mesh) -> Callable[[Callable], Callable]:
  """A function for a model to put its attentions through: each device computes its own rows and heads, nothing is sent.

  An attention takes and gives arrays whose first axis are rows, and whose last are heads, side by side.
  """

  def specs(tree):
    return jax.tree.map(lambda x: PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 2), 'tensor'), tree)

  def parted(attention: Callable) -> Callable:
    def run(*args):
      made = specs(jax.eval_shape(attention, *args))
      # The kernels do not say along which axes their results vary, as check_vma wants to know.
      return jax.shard_map(attention, mesh=mesh, in_specs=specs(args), out_specs=made, check_vma=False)(*args)

    return run

  return parted if mesh.size > 1 else lambda attention: attention


def _check_divides(name: str, shape: Sequence[int], mesh: Mesh, spec: PartitionSpec) -> None:
  for size, axes in zip(shape, spec, strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    if size % math.prod(mesh.shape[axis] for axis in axes):
      sizes = ' x '.join(f'mesh.{axis} {mesh.shape[axis]}' for axis in axes)
      raise UserError(f'{sizes} does not divide {size}, a side of {name} {tuple(shape)}: take a divisor of {size}')
