"""Which part of a batch is this host's, and how the parts become one array."""

from collections.abc import Mapping

import jax
import numpy as np

from mevit_jax.errors import UserError


def host_rows(sharding: jax.sharding.Sharding, batch_size: int, name: str = 'training.batch_size') -> slice:
  """The contiguous rows of a global batch that this host's devices hold.

  Raises:
    UserError: the devices do not divide the batch.
  """
  devices = len(sharding.device_set)
  if batch_size % devices:
    raise UserError(f'{name} {batch_size} is not divisible by the {devices} devices that share it')
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows = [index[0] for index in indices if index]
  return slice(min(r.start or 0 for r in rows), max(r.stop or batch_size for r in rows))


def host_part(array: jax.Array) -> np.ndarray:
  """This host's rows of a global array that is sharded by rows."""
  parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def global_batch(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
  """Puts this host's rows on its devices, as a part of the global batch."""
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
