"""Parses the HLO text of a compiled program: estimated cycles, collectives and custom kernels."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

_COLLECTIVE = re.compile(
  r'= (?P<type>\S.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\('
)
# Collectives between TPU slices appear as sends: each chip sends its shard over the data-center network.
_CROSS_SLICE_SEND = re.compile(
  r' = \((?P<type>\w+\[[\d,]*\]).* send\(.*_xla_megascale_target="\{(?P<slices>[\d,]+)\}.*'
  r'_xla_megascale_transfer_type="(?P<kind>\w+)"'
)
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The loop condition of jax.lax.scan and jax.lax.map: a counter that starts at 0 is less than a constant.
_LESS_THAN = re.compile(r'compare\([^()]*?%([\w.\-]+)\), direction=LT')
_CALLS = re.compile(r'\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)')
_MATMUL = re.compile(r' (dot|convolution)\(')
# A Pallas kernel on TPU: output and operand types, and its `CostEstimate`.
_KERNEL = re.compile(
  r'%(?P<name>[\w\-]+)[\w.\-]* = (?P<outputs>\S.*?) custom-call\(.*custom_call_target="tpu_custom_call"'
)
_OPERANDS = re.compile(r'operand_layout_constraints=\{(.*?\})\}')
_COST_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a program, per device.

  Attributes:
    kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'.
    shapes: output shapes.
    size: bytes of the unsharded arrays: output of an all-gather, input of a reduce-scatter.
    groups: `groups size`, replica groups as indices into the mesh's devices; empty means one group of all devices.
    executions: number of executions per program run.
    slices: number of slices of a collective over the data-center network, whose arrays are each chip's shard; else 1.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  size: int
  groups: np.ndarray
  executions: int
  slices: int = 1

  def bytes_sent(self, devices: int) -> float:
    """Returns the bytes that each device sends in a ring of `devices`, over all executions."""
    fraction = (devices - 1) / devices
    factor = {'all-reduce': 2 * fraction, 'collective-permute': 1.0}.get(self.kind, fraction)
    return self.executions * self.size * factor


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A custom (Pallas) kernel, for which the compiler estimates no cycles.

  Attributes:
    name: kernel name.
    flops: FLOPs of the matrix units, with padded tiles, from the kernel's `CostEstimate`; 0 without one.
    bytes: bytes of operands and outputs, each counted once, or of the `CostEstimate` if that is larger.
    executions: number of executions per program run.
  """

  name: str
  flops: int
  bytes: int
  executions: int


@dataclasses.dataclass(frozen=True)
class Program:
  """Costs of a compiled program.

  Attributes:
    cycles: the compiler's cycle estimates by category: 'matmul' (with fused operations), 'other fusions', 'copies',
      'other'. Loop bodies count once per iteration. Collectives have no estimate; only TPU programs have estimates.
    collectives: collectives, one entry per instruction.
    unknown_loops: number of loops without a known trip count; their bodies count once.
    kernels: custom kernels, one entry per instruction; they are not included in `cycles`.
  """

  cycles: dict[str, int]
  collectives: tuple[Collective, ...]
  unknown_loops: int
  kernels: tuple[Kernel, ...] = ()


def read_program(text: str) -> Program:
  """Parses `compiled.as_text()` of any backend.

  An asynchronous collective appears in several computations, from its start to its end; it is counted at its start.
  """
  lines, entry = _computations(text)
  executions, unknown_loops = _execution_counts(lines, entry)
  continuations = _async_continuations(lines)
  collectives: list[Collective] = []
  matmuls = _matmul_computations(lines)
  cycles: collections.Counter[str] = collections.Counter()
  kernels: list[Kernel] = []
  for name, body in lines.items():
    for line in body if executions.get(name) else ():
      if match := _KERNEL.search(line):
        kernels.append(_kernel(match, line, executions[name]))
      if estimate := _CYCLES.search(line):
        cycles[_cycle_category(line, matmuls)] += executions[name] * int(estimate[1])
      if name not in continuations and (match := _COLLECTIVE.search(line)):
        collectives.append(_collective(match, line, name, executions[name]))
      if match := _CROSS_SLICE_SEND.search(line):
        collectives.append(_cross_slice_collective(match, executions[name]))
  return Program(dict(cycles), tuple(collectives), unknown_loops, tuple(kernels))


def _async_continuations(lines: dict[str, list[str]]) -> set[str]:
  """Returns the computations in which a TPU continues or ends an asynchronous collective.

  Channel ids do not identify them: fused collectives share one.
  """
  ends = (line for body in lines.values() for line in body if re.match(r'\s*(ROOT )?%async-collective-done', line))
  fused = {name for name in lines if name.startswith('async_collective_fusion')}
  return fused | {called for line in ends for called in _called_computations(line)}


def _kernel(match: re.Match, line: str, executions: int) -> Kernel:
  operands, estimate = _OPERANDS.search(line), _COST_ESTIMATE.search(line)
  types = match['outputs'] + (operands[1] if operands else '')
  flops, estimated_bytes = (int(estimate[1]), int(estimate[2])) if estimate else (0, 0)
  return Kernel(match['name'], flops, max(int(_total_bytes(_ARRAY.finditer(types))), estimated_bytes), executions)


def _matmul_computations(lines: dict[str, list[str]]) -> set[str]:
  """Returns the computations that contain a matrix product, directly or in a computation they call."""
  matmuls = {name for name, body in lines.items() if any(_MATMUL.search(line) for line in body)}
  calls = {name: {called for line in body for called in _called_computations(line)} for name, body in lines.items()}
  while more := {name for name, called in calls.items() if name not in matmuls and called & matmuls}:
    matmuls |= more
  return matmuls


def _cycle_category(line: str, matmuls: set[str]) -> str:
  """Returns the category of an instruction's cycles."""
  if _MATMUL.search(line) or any(name in matmuls for name in _CALLS.findall(line)):
    return 'matmul'
  if ' fusion(' in line:
    return 'other fusions'
  return 'copies' if re.search(r' (copy|copy-start|transpose|bitcast-convert)\(', line) else 'other'


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of every computation by name, and the name of the entry computation."""
  lines: dict[str, list[str]] = {}
  entry = current = ''
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = match['name']
      lines[current] = []
      entry = current if match['entry'] else entry
    elif current:
      lines[current].append(line)
  return lines, entry


def _execution_counts(lines: dict[str, list[str]], entry: str) -> tuple[dict[str, int], int]:
  """Returns the number of executions of every computation, and the number of loops without a known trip count."""
  executions, pending, unknown_loops = {entry: 1}, [entry], 0
  while pending:
    name = pending.pop()
    for line in lines.get(name, ()):
      trips = _trip_count(line, lines) if ' while(' in line else 1
      if trips is None:
        trips = 1
        unknown_loops += 1
      for called in _called_computations(line):
        if trips and called not in executions:
          executions[called] = executions[name] * trips
          pending.append(called)
  return executions, unknown_loops


def _trip_count(line: str, lines: dict[str, list[str]]) -> int | None:
  """Returns the trip count of a loop, from its annotation or its condition; None if unknown."""
  if known := _KNOWN_TRIP_COUNT.search(line):
    return int(known[1])
  called = re.search(r'condition=%?([\w.\-]+)', line)
  condition = '\n'.join(lines.get(called[1], ())) if called else ''
  if not (bound := _LESS_THAN.search(condition)):
    return None
  limit = re.search(rf'%{re.escape(bound[1])} = s32\[\]\S* constant\((\d+)\)', condition)
  return int(limit[1]) if limit else None


def _called_computations(line: str) -> Iterator[str]:
  yield from _CALLS.findall(line)
  for branches in _BRANCHES.findall(line):
    yield from (name.strip().lstrip('%') for name in branches.split(','))


def _collective(match: re.Match, line: str, computation: str, executions: int) -> Collective:
  kind, groups, arrays = match['kind'], _groups(line), _output_arrays(match)
  size = _total_bytes(arrays)
  if kind == 'reduce-scatter':
    size *= groups.shape[-1]
  if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'  # on TPU: an all-reduce of which each device keeps its shard
  return Collective(kind, tuple(map(_shape, arrays)), int(size), groups, executions)


def _cross_slice_collective(match: re.Match, executions: int) -> Collective:
  kind, arrays = match['kind'].lower().replace('_', '-'), list(_ARRAY.finditer(match['type']))
  slices = len(_ints(match['slices']))
  return Collective(
    kind, tuple(map(_shape, arrays)), int(_total_bytes(arrays)), np.zeros((0, 0), int), executions, slices
  )


def _output_arrays(match: re.Match) -> list[re.Match]:
  """Returns the output arrays of a collective; the type of an asynchronous start lists its operands first."""
  arrays = list(_ARRAY.finditer(match['type']))
  if match['start'] and match['kind'] == 'collective-permute':
    return arrays[1:2]
  if match['start'] and match['kind'] != 'all-reduce':
    return arrays[len(arrays) // 2 :]
  return arrays


def _total_bytes(arrays: Iterable[re.Match]) -> float:
  """Returns the total size of arrays."""
  return sum(_itemsize(array['dtype']) * math.prod(_shape(array)) for array in arrays)


def _shape(array: re.Match) -> tuple[int, ...]:
  return tuple(_ints(array['shape']))


def _itemsize(dtype: str) -> float:
  """Returns the bytes of one element; s4 has half a byte."""
  bits = re.search(r'\d+', dtype)
  return int(bits[0]) / 8 if bits else 1


def _groups(line: str) -> np.ndarray:
  """Parses replica groups, `groups size`, in any of HLO's notations."""
  if pairs := re.search(r'source_target_pairs=\{(\{.*?\})\}', line):
    return _explicit_groups(pairs[1])
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', line):
    return _iota(iota[2]).reshape(_ints(iota[1]))
  if mesh := re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?[, ]*\{(.*?)\}', line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    order = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
    return _mesh_groups(order, sizes, mesh[3])
  if lists := re.search(r'replica_groups=\{(\{.*?\})\}', line):
    return _explicit_groups(lists[1])
  return np.zeros((0, 0), int)


def _mesh_groups(order: np.ndarray, sizes: dict[str, int], axes: str) -> np.ndarray:
  """Returns the groups along mesh axes: 'a', or the sub-axis 'a':(2)4 of size 4 with 2 outer elements."""
  names: list[str] = []
  shape: list[int] = []
  selected = {name: (int(outer or 1), int(size or 0)) for name, outer, size in _AXIS.findall(axes)}
  for name, size in sizes.items():
    outer, own = selected.get(name, (1, 0))
    own = own or size
    names += [f'{name} outer', name, f'{name} inner']
    shape += [outer, own, size // outer // own]
  last = [i for i, name in enumerate(names) if name in selected]
  first = [i for i in range(len(names)) if i not in last]
  return order.reshape(shape).transpose(first + last).reshape(-1, math.prod(shape[i] for i in last))


_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


def _iota(text: str) -> np.ndarray:
  """Parses an iota tile assignment: '[4,2]T(1,0)' is 0 to 7 in a 4x2 array, transposed."""
  shape, _, axes = text.partition('T')
  order = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
  return (order.transpose(_ints(axes)) if axes else order).ravel()


def _explicit_groups(text: str) -> np.ndarray:
  groups = [_ints(group) for group in re.findall(r'\{([\d,\s]*)\}', text)]
  return np.array(groups) if len({len(group) for group in groups}) == 1 else np.zeros((0, 0), int)


def _ints(text: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text)]
