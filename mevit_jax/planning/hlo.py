"""What the text of a compiled program says: the compiler's cycles, every collective, and every kernel of one's own."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

_COLLECTIVE = re.compile(
  r'= (?P<type>\S.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\('
)
# Between slices of TPUs no collective is left: each chip sends its part into the network, where it is summed.
_ACROSS = re.compile(
  r' = \((?P<type>\w+\[[\d,]*\]).* send\(.*_xla_megascale_target="\{(?P<slices>[\d,]+)\}.*'
  r'_xla_megascale_transfer_type="(?P<kind>\w+)"'
)
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What jax.lax.scan's and map's condition reads: a counter from 0 on, below a constant.
_BELOW = re.compile(r'compare\([^()]*?%([\w.\-]+)\), direction=LT')
_CALLS = re.compile(r'\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)')
_MATMUL = re.compile(r' (dot|convolution)\(')
# A Pallas kernel for TPUs: the arrays that it reads, and what its author says of it.
_KERNEL = re.compile(
  r'%(?P<name>[\w\-]+)[\w.\-]* = (?P<made>\S.*?) custom-call\(.*custom_call_target="tpu_custom_call"'
)
_READ = re.compile(r'operand_layout_constraints=\{(.*?\})\}')
_SAID = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, as one device sees it.

  Attributes:
    kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'.
    shapes: of the arrays that it makes.
    size: bytes of the whole arrays: what an all-gather makes, what a reduce-scatter reduces.
    groups: `groups size`, the devices that take part together, by their place in the mesh; empty is all in one.
    times: how often the program runs it.
    slices: more than one where it goes between slices, over their network; its arrays are then each chip's own part.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  size: int
  groups: np.ndarray
  times: int
  slices: int = 1

  def sent(self, devices: int) -> float:
    """Bytes that each device sends, in all, where `devices` work together around a ring."""
    share = (devices - 1) / devices
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)
    return self.times * self.size * factor


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel of one's own (Pallas), of which the compiler knows no cycles.

  Attributes:
    name: as its author calls it.
    flops: of the matrix units, tiles padded, by its author's `CostEstimate`; 0 where there is none.
    bytes: of the arrays that it reads and makes, each once; or its author's, where those are more.
    times: how often the program runs it.
  """

  name: str
  flops: int
  bytes: int
  times: int


@dataclasses.dataclass(frozen=True)
class Program:
  """What a program's text says.

  Attributes:
    cycles: the compiler's own estimate, a loop's body as often as it runs, by what they are spent on: 'matmul' (with
      what is fused to it), 'other fusions', 'copies', 'other'. Collectives have none, and TPUs alone have any.
    collectives: all of them, each once.
    open_loops: loops whose number of runs the text does not say: their bodies are counted once.
    kernels: of one's own, each place once; they are not among the cycles.
  """

  cycles: dict[str, int]
  collectives: tuple[Collective, ...]
  open_loops: int
  kernels: tuple[Kernel, ...] = ()


def read_program(text: str) -> Program:
  """Reads `compiled.as_text()`, of any backend.

  An asynchronous collective stands in several computations, from its start to its end: it is counted at its start.
  """
  lines, entry = _computations(text)
  runs, open_loops = _runs(lines, entry)
  ongoing = _ongoing(lines)
  collectives: list[Collective] = []
  matmuls = _with_matmuls(lines)
  cycles: collections.Counter[str] = collections.Counter()
  kernels: list[Kernel] = []
  for name, body in lines.items():
    for line in body if runs.get(name) else ():
      if match := _KERNEL.search(line):
        kernels.append(_kernel(match, line, runs[name]))
      if estimate := _CYCLES.search(line):
        cycles[_spent_on(line, matmuls)] += runs[name] * int(estimate[1])
      if name not in ongoing and (match := _COLLECTIVE.search(line)):
        collectives.append(_collective(match, line, name, runs[name]))
      if match := _ACROSS.search(line):
        collectives.append(_across_slices(match, runs[name]))
  return Program(dict(cycles), tuple(collectives), open_loops, tuple(kernels))


def _ongoing(lines: dict[str, list[str]]) -> set[str]:
  """The computations in which a TPU goes on with a collective that has started, or ends it.

  Channels do not tell one from another: fused ones share theirs.
  """
  ends = (line for body in lines.values() for line in body if re.match(r'\s*(ROOT )?%async-collective-done', line))
  fused = {name for name in lines if name.startswith('async_collective_fusion')}
  return fused | {called for line in ends for called in _called(line)}


def _kernel(match: re.Match, line: str, times: int) -> Kernel:
  read, said = _READ.search(line), _SAID.search(line)
  moved = int(_bytes(_ARRAY.finditer(match['made'])) + _bytes(_ARRAY.finditer(read[1] if read else '')))
  flops, claimed = (int(said[1]), int(said[2])) if said else (0, 0)
  return Kernel(match['name'], flops, max(moved, claimed), times)


def _with_matmuls(lines: dict[str, list[str]]) -> set[str]:
  """The computations that hold a matrix product, or call one that does."""
  found = {name for name, body in lines.items() if any(_MATMUL.search(line) for line in body)}
  calls = {name: {called for line in body for called in _called(line)} for name, body in lines.items()}
  while more := {name for name, called in calls.items() if name not in found and called & found}:
    found |= more
  return found


def _spent_on(line: str, matmuls: set[str]) -> str:
  """What an instruction's cycles are spent on."""
  if _MATMUL.search(line) or any(name in matmuls for name in _CALLS.findall(line)):
    return 'matmul'
  if ' fusion(' in line:
    return 'other fusions'
  return 'copies' if re.search(r' (copy|copy-start|transpose|bitcast-convert)\(', line) else 'other'


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of every computation by its name, and the name of the one that runs first."""
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


def _runs(lines: dict[str, list[str]], entry: str) -> tuple[dict[str, int], int]:
  """How often each computation runs, and how many loops do not say so."""
  runs, waiting, open_loops = {entry: 1}, [entry], 0
  while waiting:
    name = waiting.pop()
    for line in lines.get(name, ()):
      trips = _trips(line, lines) if ' while(' in line else 1
      if trips is None:
        trips = 1
        open_loops += 1
      for called in _called(line):
        if trips and called not in runs:
          runs[called] = runs[name] * trips
          waiting.append(called)
  return runs, open_loops


def _trips(line: str, lines: dict[str, list[str]]) -> int | None:
  """How often a loop runs, if it says so or its condition does."""
  if known := _TRIPS.search(line):
    return int(known[1])
  called = re.search(r'condition=%?([\w.\-]+)', line)
  condition = '\n'.join(lines.get(called[1], ())) if called else ''
  if not (below := _BELOW.search(condition)):
    return None
  limit = re.search(rf'%{re.escape(below[1])} = s32\[\]\S* constant\((\d+)\)', condition)
  return int(limit[1]) if limit else None


def _called(line: str) -> Iterator[str]:
  yield from _CALLS.findall(line)
  for branches in _BRANCHES.findall(line):
    yield from (name.strip().lstrip('%') for name in branches.split(','))


def _collective(match: re.Match, line: str, computation: str, times: int) -> Collective:
  kind, groups, arrays = match['kind'], _groups(line), _made(match)
  size = _bytes(arrays)
  if kind == 'reduce-scatter':
    size *= groups.shape[-1]
  if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'  # as TPUs write it: an all-reduce of which each device keeps its part
  return Collective(kind, tuple(map(_shape, arrays)), int(size), groups, times)


def _across_slices(match: re.Match, times: int) -> Collective:
  kind, arrays = match['kind'].lower().replace('_', '-'), list(_ARRAY.finditer(match['type']))
  slices = len(_numbers(match['slices']))
  return Collective(kind, tuple(map(_shape, arrays)), int(_bytes(arrays)), np.zeros((0, 0), int), times, slices)


def _made(match: re.Match) -> list[re.Match]:
  """The arrays that a collective makes; a start of one names its operands first."""
  arrays = list(_ARRAY.finditer(match['type']))
  if match['start'] and match['kind'] == 'collective-permute':
    return arrays[1:2]
  if match['start'] and match['kind'] != 'all-reduce':
    return arrays[len(arrays) // 2 :]
  return arrays


def _bytes(arrays: Iterable[re.Match]) -> float:
  """Of all of them together."""
  return sum(_width(array['dtype']) * math.prod(_shape(array)) for array in arrays)


def _shape(array: re.Match) -> tuple[int, ...]:
  return tuple(_numbers(array['shape']))


def _width(dtype: str) -> float:
  """Bytes of a number."""
  bits = re.search(r'\d+', dtype)
  return int(bits[0]) / 8 if bits else 1


def _groups(line: str) -> np.ndarray:
  """The devices that take part together, `groups size`, from any of the ways of writing them."""
  if pairs := re.search(r'source_target_pairs=\{(\{.*?\})\}', line):
    return _lists(pairs[1])
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', line):
    return _iota(iota[2]).reshape(_numbers(iota[1]))
  if mesh := re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?[, ]*\{(.*?)\}', line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    order = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
    return _along(order, sizes, mesh[3])
  if lists := re.search(r'replica_groups=\{(\{.*?\})\}', line):
    return _lists(lists[1])
  return np.zeros((0, 0), int)


def _along(order: np.ndarray, sizes: dict[str, int], axes: str) -> np.ndarray:
  """The groups along some axes of a mesh: 'a', or 'a':(2)4, the part of a that has 2 before it and 4 of its own."""
  names: list[str] = []
  shape: list[int] = []
  wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(axes)}
  for name, size in sizes.items():
    before, own = wanted.get(name, (1, 0))
    own = own or size
    names += [f'{name} before', name, f'{name} after']
    shape += [before, own, size // before // own]
  last = [i for i, name in enumerate(names) if name in wanted]
  first = [i for i in range(len(names)) if i not in last]
  return order.reshape(shape).transpose(first + last).reshape(-1, math.prod(shape[i] for i in last))


_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


def _iota(text: str) -> np.ndarray:
  """'[4,2]T(1,0)': 0 to 7 in a 4x2 array, transposed."""
  shape, _, axes = text.partition('T')
  order = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return (order.transpose(_numbers(axes)) if axes else order).ravel()


def _lists(text: str) -> np.ndarray:
  groups = [_numbers(group) for group in re.findall(r'\{([\d,\s]*)\}', text)]
  return np.array(groups) if len({len(group) for group in groups}) == 1 else np.zeros((0, 0), int)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text)]
