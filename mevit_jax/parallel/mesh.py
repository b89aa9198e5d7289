"""The devices as a mesh."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mevit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices along each axis.

  Attributes:
    data: devices that share a batch; -1 is all there are.
  """

  data: int = -1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh of a config, over all devices of all hosts."""
  devices = jax.devices() if devices is None else devices
  count = len(devices) if config.data == -1 else config.data
  if not 1 <= count <= len(devices):
    raise UserError(f'mesh.data is {config.data}, but there are {len(devices)} devices')
  return jax.sharding.Mesh(np.asarray(devices[:count]), ('data',))
