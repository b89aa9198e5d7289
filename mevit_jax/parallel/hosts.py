"""Per-process slices of a global batch, and their assembly into global arrays."""

from collections.abc import Mapping

import jax
import numpy as np

from mevit_jax.errors import UserError
from mevit_jax.parallel.mesh import batch_shards


def process_batch_slice(sharding: jax.sharding.NamedSharding, batch_size: int) -> slice:
  """Returns the contiguous slice of a global batch that the devices of this process hold.

  Processes whose devices hold the same examples (a tensor axis across hosts) get the same slice.

  Raises:
    UserError: the batch size is not divisible by the number of batch shards, or the slice is not contiguous.
  """
  shards, tensor = batch_shards(sharding.mesh), sharding.mesh.shape['tensor']
  if batch_size % shards:
    unit = 'devices' if tensor == 1 else f'groups of {tensor} devices'
    raise UserError(
      f'training.batch_size {batch_size} is not divisible by the {shards} {unit}; use a multiple of {shards}'
    )
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  ranges = {index[0].indices(batch_size)[:2] for index in indices if index}
  if not ranges:
    raise UserError(
      f'mesh.data leaves process {jax.process_index()} without devices: use fewer processes, or all devices'
    )
  start, stop = min(ranges)[0], max(ranges)[1]
  if sum(end - begin for begin, end in ranges) != stop - start:
    raise UserError(
      f'process {jax.process_index()} has batch ranges {sorted(ranges)}, which are not contiguous: '
      'use other mesh.* sizes'
    )
  return slice(start, stop)


def local_shards(array: jax.Array) -> np.ndarray:
  """Returns the part of a batch-sharded global array that this process holds."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def global_batch(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
  """Builds the global batch from the slice of this process, which is copied to its devices."""
  return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
