"""Cost of a compiled step per chip: memory, FLOPs, collectives and step time."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mevit_jax.planning.chips import Chip, Topology, bandwidth
from mevit_jax.planning.hlo import Collective, Kernel, read_program

# XLA autotunes Triton's matrix products against cuBLAS's, which needs a GPU; its default tiles fail for some widths
# (192, jaxlib 0.10.2). Memory and collectives are the same with cuBLAS.
_COMPILER_OPTIONS: dict[str, jax.stages.CompilerOptions] = {'cuda': {'xla_gpu_enable_triton_gemm': False}}

# Assumed efficiency of custom kernels, relative to peak FLOP/s or peak HBM bandwidth.
_KERNEL_EFFICIENCY = 0.6


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All collectives of one kind with the same group size.

  Attributes:
    kind: 'all-reduce', ...
    devices: devices per group, or slices for collectives across slices.
    across_slices: True for collectives over the data-center network; `bytes` are then per chip.
    count: number of collectives per step.
    bytes: total bytes of the unsharded arrays.
    seconds: total transfer time over the links, one collective after the other.
  """

  kind: str
  devices: int
  across_slices: bool
  count: int
  bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """Cost of a step; bytes are per chip.

  Attributes:
    memory: bytes by purpose; empty if the step does not fit and the compiler reported the total only.
    needed: total bytes.
    available: bytes that a program can allocate.
    flops: model FLOPs of the step on all chips, by formula.
    peak_flops: peak FLOP/s of all chips.
    bytes_accessed: HBM traffic by the compiler's cost analysis, loop bodies counted once; 0 if unknown.
    cycles: the compiler's cycle estimates by category; 'kernels' are custom kernels, by `kernel_cycles`.
    compute: seconds of those cycles; 0 without estimates.
    traffic: collectives.
    unknown_loops: number of loops whose cycles are counted once because their trip count is unknown.
    compile_seconds: compilation time on this machine.
  """

  memory: dict[str, int]
  needed: float
  available: float
  flops: float
  peak_flops: float
  bytes_accessed: float = 0
  cycles: dict[str, int] = dataclasses.field(default_factory=dict)
  compute: float = 0
  traffic: tuple[Traffic, ...] = ()
  unknown_loops: int = 0
  compile_seconds: float = 0

  @property
  def fits(self) -> bool:
    """True if the step fits into the memory of a chip."""
    return self.needed <= self.available

  @property
  def collective(self) -> float:
    """Seconds of all collectives."""
    return sum(traffic.seconds for traffic in self.traffic)

  @property
  def seconds(self) -> tuple[float, float]:
    """Step time with collectives fully overlapped with compute, and not overlapped; zeros if compute is unknown."""
    return (max(self.compute, self.collective), self.compute + self.collective) if self.compute else (0.0, 0.0)

  @property
  def mfu(self) -> tuple[float, float]:
    """Model FLOPs utilization (a fraction of peak) at those two step times."""
    fast, slow = (self.flops / self.peak_flops / seconds if seconds else 0.0 for seconds in self.seconds)
    return fast, slow


def plan_step(
  lowered: jax.stages.Lowered, topology: Topology, mesh: jax.sharding.Mesh, sizes: Mapping[str, int], flops: float
) -> StepPlan:
  """Compiles a step and estimates its cost.

  Args:
    lowered: step, lowered for the devices of `mesh`.
    topology: topology of those devices.
    mesh: device mesh.
    sizes: bytes per chip of the step's inputs, by purpose.
    flops: model FLOPs of the step.
  """
  chip, start = topology.chip, time.monotonic()
  peak_flops = chip.flops * mesh.size
  try:
    compiled = lowered.compile(_COMPILER_OPTIONS.get(chip.platform))
  except jax.errors.JaxRuntimeError as error:
    needed = needed_memory(str(error), sum(sizes.values()))
    if needed is None:
      raise
    return StepPlan({}, needed, chip.memory, flops, peak_flops, compile_seconds=time.monotonic() - start)
  compile_seconds = time.monotonic() - start
  memory = _memory(compiled, sizes)
  text = compiled.as_text()
  assert text is not None
  program = read_program(text)
  cycles = dict(program.cycles)
  if program.kernels:
    cycles['kernels'] = kernel_cycles(program.kernels, chip)
  cost = compiled.cost_analysis() if chip.platform == 'tpu' else None
  return StepPlan(
    memory,
    needed=sum(memory.values()),
    available=chip.memory,
    flops=flops,
    peak_flops=peak_flops,
    bytes_accessed=(cost or {}).get('bytes accessed', 0),
    cycles=cycles,
    compute=sum(cycles.values()) / chip.clock if chip.clock else 0,
    traffic=_traffic(program.collectives, topology, mesh),
    unknown_loops=program.unknown_loops,
    compile_seconds=compile_seconds,
  )


def kernel_cycles(kernels: Sequence[Kernel], chip: Chip) -> int:
  """Estimates the cycles of custom kernels by a roofline: the larger of FLOPs and bytes, at 0.6 of the chip's peak."""
  seconds = sum(k.executions * max(k.flops / chip.flops, k.bytes / chip.hbm_bandwidth) for k in kernels)
  return round(seconds * chip.clock / _KERNEL_EFFICIENCY)


def needed_memory(message: str, inputs: int) -> float | None:
  """Parses the bytes that a step needs from an out-of-memory error; None for other errors.

  Args:
    message: the compiler's error message.
    inputs: bytes of the step's inputs, which are added where the message gives temporaries only.
  """
  if match := re.search(r'Used ([\d.]+)([KMGT]?) of', message):
    inputs = 0
  elif not (match := re.search(r'HLO temporaries \(([\d.]+)([KMGT]?)\)', message)):
    return None
  return inputs + float(match[1]) * 1024 ** ' KMGT'.index(match[2] or ' ')


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes on one device of a pytree of arrays, or of `jax.ShapeDtypeStruct`s with shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def seconds_of(collective: Collective, topology: Topology, members: Sequence[jax.Device]) -> float:
  """Returns the transfer time of a collective over the links of its devices, or over the network between slices."""
  if collective.slices > 1:
    return collective.bytes_sent(collective.slices) / topology.chip.network
  return collective.bytes_sent(len(members)) / bandwidth(topology.chip, topology, members) if len(members) > 1 else 0.0


def memory_limit(chip: Chip) -> str:
  """Formats the memory that a program can allocate."""
  return f'{chip.memory / 2**30:.4g} GiB HBM' + ('' if chip.platform == 'tpu' else " (JAX's default of 75 %)")


def _memory(compiled: jax.stages.Compiled, sizes: Mapping[str, int]) -> dict[str, int]:
  """Returns bytes per chip by purpose."""
  stats = compiled.memory_analysis()
  assert stats is not None
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  padding = stats.argument_size_in_bytes - sum(sizes.values())
  return {
    **sizes,
    'temporaries': stats.temp_size_in_bytes,
    'program': stats.generated_code_size_in_bytes,
    'padding and outputs': outputs + padding,
  }


def _traffic(collectives: Sequence[Collective], topology: Topology, mesh: jax.sharding.Mesh) -> tuple[Traffic, ...]:
  totals: dict[tuple[str, int, bool], list[float]] = {}
  devices = mesh.devices.ravel()
  for collective in collectives:
    members = list(devices[collective.groups[0]] if collective.groups.size else devices)
    across = collective.slices > 1
    key = (collective.kind, collective.slices if across else len(members), across)
    total = totals.setdefault(key, [0, 0, 0])
    total[0] += collective.executions
    total[1] += collective.executions * collective.size
    total[2] += seconds_of(collective, topology, members)
  rows = (Traffic(*key, int(count), int(size), seconds) for key, (count, size, seconds) in totals.items())
  return tuple(sorted(rows, key=lambda row: -row.seconds))
