"""Which part of a batch is this host's, and how the parts become one array."""

from collections.abc import Mapping

import jax
import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.parallel.mesh import batch_shards


def process_batch_slice(sharding: jax.sharding.NamedSharding, batch_size: int) -> slice:
  """The contiguous rows of a global batch that this host's devices hold; hosts that share rows all read them.

  Raises:
    UserError: the devices do not divide the batch.
  """
  parts, tensor = batch_shards(sharding.mesh), sharding.mesh.shape['tensor']
  if batch_size % parts:
    what = 'devices' if tensor == 1 else f'groups of {tensor} devices'
    raise UserError(f'training.batch_size {batch_size} is not divisible by the {parts} {what} that share it')
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows = {index[0].indices(batch_size)[:2] for index in indices if index}
  if not rows:
    raise UserError(
      f'mesh.data leaves process {jax.process_index()} without devices: use fewer processes, or all devices'
    )
  start, stop = min(rows)[0], max(rows)[1]
  if sum(b - a for a, b in rows) != stop - start:
    raise UserError(f'this host has rows {sorted(rows)} of a batch, not a run of them: choose other mesh.* sizes')
  return slice(start, stop)


def local_shards(array: jax.Array) -> np.ndarray:
  """This host's rows of a global array that is sharded by rows."""
  parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def global_batch(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
  """Puts this host's rows on its devices, as a part of the global batch."""
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
