"""Data sheets of TPU chips and GPUs, and abstract devices of their topologies to compile for."""

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from mevit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Data sheet of a TPU chip or a GPU, in bytes and seconds.

  Attributes:
    name: 'v5e'.
    platform: 'tpu' or 'cuda'.
    flops: peak FLOP/s, dense bfloat16.
    memory: HBM that a program can allocate.
    hbm_bandwidth: bytes per second.
    clock: cycles per second; 0 for GPUs, whose compiler estimates no cycles.
    link: bytes per second and direction of one link: to a neighbor in a TPU torus, or to a GPU's switch.
    ring: a torus dimension that is a multiple of this has wrap-around links; 0 for GPUs.
    network: bytes per second that each chip sends over the data-center network.
    target: parameters of XLA's GPU target config.
  """

  name: str
  platform: str
  flops: float
  memory: float
  hbm_bandwidth: float
  clock: float
  link: float
  ring: int
  network: float
  target: dict[str, Any] = dataclasses.field(default_factory=dict)


# TPUs: cloud.google.com/tpu/docs, and jax-ml.github.io/scaling-book for links; the memory is what libtpu 0.0.42 lets a
# program allocate, and the clock is the one at which the matrix units reach `flops`. GPUs: NVIDIA's data sheets of the
# SXM boards; JAX preallocates three quarters of their memory (XLA_PYTHON_CLIENT_MEM_FRACTION).
_HOPPER: dict[str, Any] = {
  'cores': 132, 'fpus': 128, 'shared': 233472, 'shared_optin': 232448, 'l2': 52428800, 'ghz': 1.98,
  'capability': (9, 0),
}  # fmt: skip
_AMPERE: dict[str, Any] = {
  'cores': 108, 'fpus': 64, 'shared': 167936, 'shared_optin': 166912, 'l2': 41943040, 'ghz': 1.41,
  'capability': (8, 0),
}  # fmt: skip
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 'tpu', 197e12, 15.75 * 2**30, 819e9, 1.5e9, 45e9, 16, 3.1e9),
    Chip('v5p', 'tpu', 459e12, 95.74 * 2**30, 2765e9, 1.75e9, 90e9, 4, 6.25e9),
    Chip('v6e', 'tpu', 918e12, 31.25 * 2**30, 1640e9, 1.75e9, 90e9, 16, 12.5e9),
    Chip('a100', 'cuda', 312e12, 0.75 * 85.1e9, 2039e9, 0, 300e9, 0, 25e9, {**_AMPERE, 'memory': 85.1e9}),
    Chip('h100', 'cuda', 989e12, 0.75 * 85.5e9, 3350e9, 0, 450e9, 0, 50e9, {**_HOPPER, 'memory': 85.5e9}),
    Chip('h200', 'cuda', 989e12, 0.75 * 150e9, 4800e9, 0, 450e9, 0, 50e9, {**_HOPPER, 'memory': 150e9}),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Connected chips: 'v5e:16x16' is 256 chips, 'h200:8' one host with 8 GPUs, 'h200:2x8' two such hosts.

  Attributes:
    name: 'v5e:16x16'.
    chip: data sheet of its chips.
    shape: chips along each torus dimension, or hosts and GPUs per host.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]


def parse(name: str) -> Topology:
  """Parses the name of a topology.

  Raises:
    UserError: unknown chip or malformed size.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
    examples = 'v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, h100:8, h200:2x8 (hosts x GPUs)'
    raise UserError(f'--topology {name!r} is not valid: use CHIP:SIZE with CHIP one of {", ".join(CHIPS)}: {examples}')
  return Topology(name, CHIPS[kind], tuple(map(int, shape.split('x'))))


def devices_of(topology: Topology, slices: int = 1) -> Sequence[jax.Device]:
  """Returns abstract devices of a topology, or of several TPU slices of it, to compile for.

  Raises:
    UserError: the compiler for the chip is not installed, or does not support the topology.
  """
  chip = topology.chip
  module, package = ('libtpu', 'libtpu') if chip.platform == 'tpu' else ('jax_plugins.xla_cuda13', 'jax[cuda13]')
  if not _installed(module):
    raise UserError(f'compiling for {topology.name} needs {package}: pip install "{package}"')
  try:
    if chip.platform == 'tpu':
      options = {'num_slices': slices} if slices > 1 else {}
      return topologies.get_topology_desc(platform='tpu', topology_name=topology.name, **options).devices
    hosts, gpus = topology.shape if len(topology.shape) == 2 else (1, *topology.shape)
    size = f'1x{hosts}x{gpus}'
    return topologies.get_topology_desc(
      platform='cuda', topology_name='any', topology=size, target_config=target_config(chip)
    ).devices
  except Exception as error:  # plug-ins raise many types
    raise UserError(f'--topology {topology.name} is not valid: {str(error).strip().splitlines()[-1]}') from error


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def target_config(chip: Chip) -> str:
  """Returns XLA's target config of a GPU (xla/stream_executor/device_description.proto)."""
  target = chip.target
  major, minor = target['capability']
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {target['shared']}
      threads_per_core_limit: 2048
      core_count: {target['cores']}
      fpus_per_core: {target['fpus']}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {chip.hbm_bandwidth:.0f}
      l2_cache_size: {target['l2']}
      clock_rate_ghz: {target['ghz']}
      device_memory_size: {target['memory']:.0f}
      shared_memory_per_block_optin: {target['shared_optin']}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "NVIDIA {chip.name.upper()}"
  """


def bandwidth(chip: Chip, topology: Topology, group: Sequence[jax.Device]) -> float:
  """Returns the bytes per second that each chip of a group, within one slice, sends during a collective.

  A TPU sends along every torus dimension that the group spans, in both directions if the dimension has wrap-around
  links. A GPU sends through its switch, or over the network if the group spans hosts.
  """
  if chip.platform != 'tpu':
    hosts = {device.process_index for device in group}
    return chip.link if len(hosts) == 1 else chip.network
  coordinates = np.array([device.coords for device in group])  # chips dimensions
  extents = [len(set(column)) for column in coordinates.T]
  sizes = (*topology.shape, *[1] * (len(extents) - len(topology.shape)))
  links = [
    2 if extent == size and size % chip.ring == 0 else 1
    for extent, size in zip(extents, sizes, strict=True)
    if extent > 1
  ]
  return chip.link * max(1, sum(links))
