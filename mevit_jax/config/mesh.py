"""Device mesh configuration."""

import dataclasses
from typing import Annotated, ClassVar

from mevit_jax.config.validation import COUNT, Range, Validated


@dataclasses.dataclass(frozen=True)
class MeshConfig(Validated):
  """Number of devices along each mesh axis; the batch is sharded over slice, data and fsdp.

  Attributes:
    data: data parallelism; -1 uses all remaining devices.
    fsdp: fully sharded data parallelism: devices that shard the parameters and the optimizer state.
    tensor: tensor parallelism: devices that share every example and shard attention heads and MLP hidden units.
    slice: TPU slices connected by the data-center network; only gradients cross it.
  """

  group: ClassVar[str] = 'mesh'
  data: Annotated[int, Range(-1, 10**6)] = -1
  fsdp: Annotated[int, COUNT] = 1
  tensor: Annotated[int, COUNT] = 1
  slice: Annotated[int, COUNT] = 1
