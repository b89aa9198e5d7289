"""The devices as a mesh of four axes: which of them share the batch, and which the parameters."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from mevit_jax.config.mesh import MeshConfig
from mevit_jax.errors import UserError

# The outermost first; a batch's rows lie over all but the last.
AXES = ('slice', 'data', 'fsdp', 'tensor')
BATCH_AXES = AXES[:-1]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh of a config, over all devices of all hosts, or over the first ones where `data` asks for fewer.

  Raises:
    UserError: there are not as many devices, or slices, as it asks for.
  """
  devices = sorted(jax.devices() if devices is None else devices, key=_place_of)
  for name in ('fsdp', 'tensor', 'slice'):
    if getattr(config, name) < 1:
      raise UserError(f'mesh.{name} must be at least 1, not {getattr(config, name)}')
  others = config.slice * config.fsdp * config.tensor
  if config.data == -1 and len(devices) % others:
    asked = ' x '.join(f'mesh.{name} {getattr(config, name)}' for name in ('slice', 'fsdp', 'tensor'))
    raise UserError(f'{asked} = {others} does not divide the {len(devices)} devices')
  data = len(devices) // others if config.data == -1 else config.data
  shape = (config.slice, data, config.fsdp, config.tensor)
  if data < 1 or math.prod(shape) > len(devices):
    factors = f' (x {others} along its other axes)' if others > 1 else ''
    raise UserError(f'mesh.data is {config.data}{factors}, but there are {len(devices)} devices')
  _check_slices(config, devices)
  # In the order of hosts, and not in jax's mesh_utils': that one parts a host's rows of the batch, and refuses axes
  # that are no product of the torus' sides (8 of a 16x16).
  return jax.sharding.Mesh(np.asarray(devices[: math.prod(shape)]).reshape(shape), AXES)


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
  """How many parts a batch's rows are cut into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _place_of(device: jax.Device) -> tuple[int, int, int]:
  return _slice_of(device), device.process_index, device.id


def _slice_of(device: jax.Device) -> int:
  return getattr(device, 'slice_index', None) or 0


def _check_slices(config: MeshConfig, devices: Sequence[jax.Device]) -> None:
  """Refuses a mesh whose slices are not the TPU's; of other devices any number of equal parts will do."""
  slices = len({_slice_of(device) for device in devices})
  if devices[0].platform == 'tpu' and slices != config.slice:
    raise UserError(f'mesh.slice is {config.slice}, but the {len(devices)} devices are of {slices} slices')
