"""What a compiled step takes of each chip: memory, arithmetic, collectives, and how long it would run."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence

import jax

from mevit_jax.planning.chips import Chip, Topology, bandwidth
from mevit_jax.planning.hlo import Collective, Kernel, read_program

# XLA times Triton's matrix products against cuBLAS', which it cannot where no GPU is; its untimed choice of tiles fails
# for some widths (192, jaxlib 0.10.2). Memory and collectives are the same with cuBLAS.
_OPTIONS: dict[str, jax.stages.CompilerOptions] = {'cuda': {'xla_gpu_enable_triton_gemm': False}}

# What a kernel of one's own is taken to reach of the matrix units' best, or of the memory's.
_REACHED = 0.6


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind among as many devices.

  Attributes:
    kind: 'all-reduce', ...
    devices: that take part together; slices, where it goes between them.
    across_slices: it does, over their network: its bytes are each chip's own part.
    count: how many the step runs.
    bytes: of the arrays that they make or reduce, together.
    seconds: their bytes over the links, one collective after the other.
  """

  kind: str
  devices: int
  across_slices: bool
  count: int
  bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """What a step takes; bytes are of one chip.

  Attributes:
    memory: bytes by what they hold; empty where the compiler said only how much it is in all.
    needed: bytes in all.
    available: bytes that a program may have.
    flops: of the whole step on all chips, by formula.
    flops_second: of all chips at their best.
    moved: bytes that the compiler says a chip's memory moves, a loop's body once; 0 where it does not say.
    cycles: the compiler's estimate, by what they are spent on; 'kernels' of one's own are counted by `kernel_cycles`.
    compute: seconds of those cycles; 0 where the compiler counts none.
    traffic: the collectives.
    open_loops: loops whose cycles are counted once, for want of their number.
    compile_seconds: that compiling took here.
  """

  memory: dict[str, int]
  needed: float
  available: float
  flops: float
  flops_second: float
  moved: float = 0
  cycles: dict[str, int] = dataclasses.field(default_factory=dict)
  compute: float = 0
  traffic: tuple[Traffic, ...] = ()
  open_loops: int = 0
  compile_seconds: float = 0

  @property
  def fits(self) -> bool:
    """Whether the compiler, or the chip's data sheet, has room for it."""
    return self.needed <= self.available

  @property
  def collective(self) -> float:
    """Seconds of all collectives."""
    return sum(traffic.seconds for traffic in self.traffic)

  @property
  def seconds(self) -> tuple[float, float]:
    """Of a step: the collectives all behind the arithmetic, and none; zeros where the arithmetic is not known."""
    return (max(self.compute, self.collective), self.compute + self.collective) if self.compute else (0.0, 0.0)

  @property
  def share_of_peak(self) -> tuple[float, float]:
    """Of the matrix units, at those two times."""
    fast, slow = (self.flops / self.flops_second / s if s else 0.0 for s in self.seconds)
    return fast, slow


def plan_step(
  lowered: jax.stages.Lowered, topology: Topology, mesh: jax.sharding.Mesh, sizes: Mapping[str, int], flops: float
) -> StepPlan:
  """Compiles a step and reads what it takes.

  Args:
    lowered: the step, for the devices of `mesh`.
    topology: that these are of.
    mesh: the devices.
    sizes: bytes a chip of what goes into the step, by what it is.
    flops: of the step, by formula.
  """
  chip, start = topology.chip, time.monotonic()
  best = chip.flops * mesh.size
  try:
    compiled = lowered.compile(_OPTIONS.get(chip.platform))
  except jax.errors.JaxRuntimeError as error:
    needed = needed_memory(str(error), sum(sizes.values()))
    if needed is None:
      raise
    return StepPlan({}, needed, chip.memory, flops, best, compile_seconds=time.monotonic() - start)
  took, stats, text = time.monotonic() - start, compiled.memory_analysis(), compiled.as_text()
  assert stats is not None
  assert text is not None
  program = read_program(text)
  cycles = dict(program.cycles)
  if program.kernels:
    cycles['kernels'] = kernel_cycles(program.kernels, chip)
  made = stats.output_size_in_bytes - stats.alias_size_in_bytes
  other = stats.argument_size_in_bytes - sum(sizes.values())
  memory = {
    **sizes, 'temporaries': stats.temp_size_in_bytes, 'program': stats.generated_code_size_in_bytes,
    'padding and results': made + other,
  }  # fmt: skip
  cost = compiled.cost_analysis() if chip.platform == 'tpu' else None
  return StepPlan(
    memory, sum(memory.values()), chip.memory, flops, best, (cost or {}).get('bytes accessed', 0), cycles,
    sum(cycles.values()) / chip.clock if chip.clock else 0, _traffic(program.collectives, topology, mesh),
    program.open_loops, took,
  )  # fmt: skip


def kernel_cycles(kernels: Sequence[Kernel], chip: Chip) -> int:
  """Cycles of kernels that the compiler counts none for: the larger of arithmetic's and bytes', at 0.6 of the best."""
  seconds = sum(kernel.times * max(kernel.flops / chip.flops, kernel.bytes / chip.speed) for kernel in kernels)
  return round(seconds * chip.clock / _REACHED)


def needed_memory(message: str, inputs: int) -> float | None:
  """The bytes that a step which does not fit would need, in the compiler's words; None if they are not of that.

  Where it speaks of temporaries alone, the bytes of what goes into the step are added.
  """
  if found := re.search(r'Used ([\d.]+)([KMGT]?) of', message):
    inputs = 0
  elif not (found := re.search(r'HLO temporaries \(([\d.]+)([KMGT]?)\)', message)):
    return None
  return inputs + float(found[1]) * 1024 ** ' KMGT'.index(found[2] or ' ')


def bytes_a_device(tree) -> int:
  """Of the arrays of a tree, or of their shapes with shardings, on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _traffic(collectives: Sequence[Collective], topology: Topology, mesh: jax.sharding.Mesh) -> tuple[Traffic, ...]:
  found: dict[tuple[str, int, bool], list[float]] = {}
  devices = mesh.devices.ravel()
  for collective in collectives:
    members = list(devices[collective.groups[0]] if collective.groups.size else devices)
    across = collective.slices > 1
    total = found.setdefault((collective.kind, collective.slices if across else len(members), across), [0, 0, 0])
    for i, more in enumerate((1, collective.size, seconds_of(collective, topology, members) / collective.times)):
      total[i] += collective.times * more
  rows = (Traffic(*key, int(count), int(size), s) for key, (count, size, s) in found.items())
  return tuple(sorted(rows, key=lambda row: -row.seconds))


def seconds_of(collective: Collective, topology: Topology, members: Sequence[jax.Device]) -> float:
  """How long a collective's bytes take over the links of its devices, or over the network between slices."""
  if collective.slices > 1:
    return collective.sent(collective.slices) / topology.chip.network
  return collective.sent(len(members)) / bandwidth(topology.chip, topology, members) if len(members) > 1 else 0.0


def limit_of(chip: Chip) -> str:
  """What `available` is, in words."""
  return f'{chip.memory / 2**30:.4g} GiB' + ('' if chip.platform == 'tpu' else " (JAX's three quarters)")
