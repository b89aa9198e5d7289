"""Device mesh with four axes: slice, data, fsdp and tensor."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from mevit_jax.config.mesh import MeshConfig
from mevit_jax.errors import UserError

AXES = ('slice', 'data', 'fsdp', 'tensor')  # outermost first
BATCH_AXES = AXES[:-1]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Builds the mesh of a config over all devices of all hosts, or over the first ones if `data` asks for fewer.

  Raises:
    UserError: the axis sizes do not match the number of devices or of TPU slices.
  """
  devices = sorted(jax.devices() if devices is None else devices, key=_sort_key)
  others = config.slice * config.fsdp * config.tensor
  if config.data == -1 and len(devices) % others:
    sizes = ' x '.join(f'mesh.{name} {getattr(config, name)}' for name in ('slice', 'fsdp', 'tensor'))
    raise UserError(f'{len(devices)} devices are not divisible by {sizes} = {others}; use divisors of {len(devices)}')
  data = len(devices) // others if config.data == -1 else config.data
  shape = (config.slice, data, config.fsdp, config.tensor)
  if data < 1 or math.prod(shape) > len(devices):
    factors = f' (x {others} along the other axes)' if others > 1 else ''
    raise UserError(
      f'mesh.data is {config.data}{factors}, but there are {len(devices)} devices; use -1 for all that remain'
    )
  _check_slices(config, devices)
  # Ordered by host instead of jax's mesh_utils: that interleaves the batch slices of hosts, and refuses axis sizes that
  # are not products of the torus dimensions (8 on a 16x16).
  return jax.sharding.Mesh(np.asarray(devices[: math.prod(shape)]).reshape(shape), AXES)


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
  """Returns the number of shards of a batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _sort_key(device: jax.Device) -> tuple[int, int, int]:
  return _slice_index(device), device.process_index, device.id


def _slice_index(device: jax.Device) -> int:
  return getattr(device, 'slice_index', None) or 0


def _check_slices(config: MeshConfig, devices: Sequence[jax.Device]) -> None:
  """Refuses a slice axis that differs from the number of TPU slices; other devices can be split in any way."""
  slices = len({_slice_index(device) for device in devices})
  if devices[0].platform == 'tpu' and slices != config.slice:
    raise UserError(
      f'mesh.slice is {config.slice}, but the {len(devices)} devices form {slices} TPU slices; '
      f'use --config.mesh.slice={slices}'
    )
