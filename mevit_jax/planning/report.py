"""Plans as text, as a Markdown table and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mevit_jax.planning.chips import Chip
from mevit_jax.planning.estimate import StepPlan, Traffic, memory_limit

LIMITATIONS = (
  'Not included: waiting for data, stragglers, latency of collectives (small ones take longer than their bytes), and '
  "the error of the compiler's cycle estimates. It has none for custom kernels: theirs are a roofline estimate, the "
  'larger of FLOPs (with padded tiles) and bytes, at 0.6 of peak.'
)
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
  """Cost of a config's training and evaluation steps on a topology.

  Attributes:
    topology: 'v5e:16x16'.
    chips: number of chips.
    mesh: sizes of the mesh axes that are larger than 1.
    batch_size: global batch size.
    requested_batch_size: global batch size before it was rounded up to a multiple of the batch shards.
    learning_rate: peak learning rate at this batch size.
    steps: training steps of the run.
    epochs: training epochs of the run.
    videos: videos per epoch.
    train: training step.
    evaluation: evaluation step; None if it was not compiled.
    evaluation_batch_size: videos per evaluation step.
    views: views per video in evaluation.
  """

  topology: str
  chips: int
  mesh: dict[str, int]
  batch_size: int
  requested_batch_size: int
  learning_rate: float
  steps: int
  epochs: float
  videos: int
  train: StepPlan
  evaluation: StepPlan | None
  evaluation_batch_size: int
  views: int

  @property
  def clips_per_second(self) -> tuple[float, float]:
    """Training throughput at the two step times (overlapped and not); zeros if they are unknown."""
    fast, slow = (self.batch_size / seconds if seconds else 0.0 for seconds in self.train.seconds)
    return fast, slow

  @property
  def hours(self) -> tuple[float, float]:
    """Training time of the run at the two step times."""
    fast, slow = (self.steps * seconds / 3600 for seconds in self.train.seconds)
    return fast, slow


def describe(plan: Plan, chip: Chip) -> str:
  """Formats a plan as text."""
  mesh = ' x '.join(f'{name} {size}' for name, size in plan.mesh.items()) or '1 device'
  requested = plan.requested_batch_size
  rounded = f' ({requested} rounded up to a multiple of the batch shards)' if plan.batch_size != requested else ''
  lines = [
    f'{plan.topology}: {plan.chips} chips with {memory_limit(chip)} and {chip.flops / 1e12:.0f} TFLOP/s; mesh {mesh}',
    f'  batch size {plan.batch_size}{rounded}, {plan.batch_size / plan.chips:g} per chip; '
    f'peak learning rate {plan.learning_rate:.3g}',
    '  training step',
    *step_lines(plan.train),
  ]
  if plan.train.fits and plan.train.compute:
    fast, slow = plan.clips_per_second
    lines.append(f'    throughput   {_range(slow, fast, "{:.0f}")} clips/s')
    lines.append(
      f'    run time     {_range(*plan.hours, "{:.2f}")} h for {plan.epochs:g} epochs of {plan.videos:,} videos, '
      f'{plan.steps:,} steps'
    )
  if plan.evaluation:
    lines.append(f'  evaluation step, {plan.evaluation_batch_size} videos with {plan.views} views each')
    lines += step_lines(plan.evaluation)
  return '\n'.join(lines)


def describe_memory(step: StepPlan) -> str:
  """Formats the memory of a step, and whether it fits."""
  free = (step.available - step.needed) / _GIB
  verdict = f'fits, {free:.2f} GiB free' if step.fits else f'out of memory by {-free:.2f} GiB'
  return f'{step.needed / _GIB:.2f} of {step.available / _GIB:.2f} GiB: {verdict}'


def step_lines(step: StepPlan) -> list[str]:
  """Formats the cost of a step, one quantity per line."""
  parts = ', '.join(f'{name} {size / _GIB:.3f}' for name, size in step.memory.items())
  lines = [f'    memory       {describe_memory(step)}' + (f'  ({parts})' if parts else '')]
  if not step.memory:
    return lines
  traffic = f', {step.bytes_accessed / _GIB:.4g} GiB HBM traffic per chip' if step.bytes_accessed else ''
  lines.append(f'    FLOPs        {step.flops / 1e12:.4g} TFLOP{traffic}; compiled in {step.compile_seconds:.0f} s')
  lines += [_traffic_line(traffic) for traffic in step.traffic]
  if step.compute:
    total = sum(step.cycles.values())
    cycles = ', '.join(f'{name} {100 * n / total:.0f} %' for name, n in _by_size(step.cycles))
    lines.append(f'    cycles       {total / 1e6:.1f} M: {cycles}')
    lines.append(
      f'    step time    {_milliseconds(step)} ms (collectives overlapped or not), MFU {_mfu(step)} (% of peak)'
    )
    if kernels := step.cycles.get('kernels', 0):
      lines.append(f'    kernels      {kernels / 1e6:.1f} M of these cycles are a roofline estimate of custom kernels')
  if step.unknown_loops:
    lines.append(f'    warning      {step.unknown_loops} loops without a known trip count count once: time too short')
  return lines


def table(plans: Sequence[Plan]) -> str:
  """Formats plans as a Markdown table, one row per plan."""
  rows = [
    '| chips | mesh | batch size | memory GiB | step ms | clips/s | MFU | hours |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for plan in plans:
    step = plan.train
    mesh = ' '.join(f'{name} {size}' for name, size in plan.mesh.items())
    memory = f'{step.needed / _GIB:.2f} of {step.available / _GIB:.2f}' + ('' if step.fits else ', **out of memory**')
    numbers = ['-'] * 4
    if step.fits and step.compute:
      throughput, hours = _range(*plan.clips_per_second[::-1], '{:.0f}'), _range(*plan.hours, '{:.2f}')
      numbers = [_milliseconds(step), throughput, _mfu(step), hours]
    rows.append(f'| {plan.topology} | {mesh} | {plan.batch_size} | {memory} | {" | ".join(numbers)} |')
  return '\n'.join(rows)


def to_dict(plan: Plan) -> dict[str, Any]:
  """Converts a plan, with its derived values, to what JSON can represent."""
  values = dataclasses.asdict(plan)
  for name, step in (('train', plan.train), ('evaluation', plan.evaluation)):
    values[name] = step and values[name] | {
      'fits': step.fits, 'collective': step.collective, 'seconds': step.seconds, 'mfu': step.mfu,
    }  # fmt: skip
  return {**values, 'clips_per_second': plan.clips_per_second, 'hours': plan.hours}


def _traffic_line(traffic: Traffic) -> str:
  across = traffic.across_slices
  return (
    f'    {traffic.kind:<19}{traffic.count:>4} x over {traffic.devices} {"slices" if across else "chips"}, '
    f'{traffic.bytes / 2**20:.4g} MiB{" per chip" if across else ""}, '
    f'{1e3 * traffic.seconds:.3f} ms on the {"network" if across else "links"}'
  )


def _by_size(cycles: dict[str, int]) -> list[tuple[str, int]]:
  return sorted(cycles.items(), key=lambda item: -item[1])


def _milliseconds(step: StepPlan) -> str:
  fast, slow = step.seconds
  return _range(1e3 * fast, 1e3 * slow, '{:.1f}')


def _mfu(step: StepPlan) -> str:
  highest, lowest = step.mfu
  return _range(100 * lowest, 100 * highest, '{:.0f}') + ' %'


def _range(low: float, high: float, form: str) -> str:
  """Formats a range: '3 to 4', or '3' if both round to the same."""
  a, b = form.format(low), form.format(high)
  return a if a == b else f'{a} to {b}'
