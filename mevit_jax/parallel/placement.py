"""Shardings of parameters, by rules over their paths, and of batches; models do not depend on the mesh."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mevit_jax.errors import UserError
from mevit_jax.parallel.mesh import BATCH_AXES
from mevit_jax.trees import path_name

# (regular expression, PartitionSpec) pairs; the first expression that matches a parameter's path (re.search) applies.
Rules = Sequence[tuple[str, PartitionSpec]]

REPLICATED: Rules = (('', PartitionSpec()),)

# Rules for a model's parameters, and for the optimizer state, which has the same paths. Blocks are stacked along the
# first axis, which is not sharded: every device computes every block. Replicated parameters (biases, norms, tokens) are
# small.
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


def param_shardings(params: Any, mesh: Mesh, rules: Rules = PARAMETERS) -> Any:
  """Returns the sharding of every array of a pytree (parameters, optimizer state, or a training state of both).

  Raises:
    UserError: a dimension is not divisible by the mesh axes that shard it.
    ValueError: no rule matches a path.
  """

  def sharding(path: Any, leaf: Any) -> NamedSharding:
    name = path_name(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        _check_divisible(name, leaf.shape, mesh, spec)
        return NamedSharding(mesh, spec)
    raise ValueError(f'no sharding rule matches {name}')

  return jax.tree_util.tree_map_with_path(sharding, params)


def abstract_with_shardings(abstract: Any, mesh: Mesh, rules: Rules = PARAMETERS) -> Any:
  """Returns a pytree of `jax.ShapeDtypeStruct`s with shardings: the target for restoring a checkpoint."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    abstract,
    param_shardings(abstract, mesh, rules),
  )


def shard_params(params: Any, mesh: Mesh, rules: Rules = PARAMETERS) -> Any:
  """Copies host arrays to the devices; every device, on any host, receives its own shard only."""
  return jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
    params,
    param_shardings(params, mesh, rules),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: split over the slice, data and fsdp axes, replicated over the tensor axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain_batch(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Returns a function that constrains a model's activations to the batch sharding.

  Without the constraint, the partitioner may gather activations instead of weights that are sharded along their width.
  """
  return lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def shard_attention(mesh: Mesh) -> Callable[[Callable], Callable]:
  """Returns a wrapper that runs an attention function per device, on its own examples and heads, without collectives.

  The attention's inputs and outputs have the batch as first axis, and the heads, side by side, as last axis.
  """

  def batch_and_head_specs(tree: Any) -> Any:
    return jax.tree.map(lambda x: PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 2), 'tensor'), tree)

  def wrap(attention: Callable) -> Callable:
    def sharded(*args: Any) -> Any:
      out_specs = batch_and_head_specs(jax.eval_shape(attention, *args))
      # check_vma requires kernels to declare the mesh axes along which their results vary; ours do not.
      return jax.shard_map(
        attention, mesh=mesh, in_specs=batch_and_head_specs(args), out_specs=out_specs, check_vma=False
      )(*args)

    return sharded

  return wrap if mesh.size > 1 else lambda attention: attention


def _check_divisible(name: str, shape: Sequence[int], mesh: Mesh, spec: PartitionSpec) -> None:
  for size, axes in zip(shape, spec, strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    if size % math.prod(mesh.shape[axis] for axis in axes):
      sizes = ' x '.join(f'mesh.{axis} {mesh.shape[axis]}' for axis in axes)
      raise UserError(f'dimension {size} of {name} {tuple(shape)} is not divisible by {sizes}; use a divisor of {size}')
