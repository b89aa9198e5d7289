"""A plan in words, as a row of a table, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mevit_jax.planning.chips import Chip
from mevit_jax.planning.estimate import StepPlan, limit_of

NOT_KNOWN = (
  'Not known here: waiting for videos, slow hosts, the latency of collectives (small ones cost more than their bytes), '
  "and how near the compiler's count of cycles comes to the chip's. It counts none for kernels of one's own: theirs "
  'are the larger of arithmetic (tiles padded) and bytes, at 0.6 of the best.'
)
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
  """A recipe's steps on some chips.

  Attributes:
    topology: 'v5e:16x16'.
    chips: how many.
    mesh: devices along each axis that has more than one.
    batch: the global one, and `asked`, the recipe's own.
    learning_rate: at its peak, for this batch.
    steps: of the whole recipe.
    epochs: of the whole recipe, `videos` each.
    train: the training step.
    evaluation: the evaluation step, of `evaluation_batch` videos with `views` each.
  """

  topology: str
  chips: int
  mesh: dict[str, int]
  batch: int
  asked: int
  learning_rate: float
  steps: int
  epochs: float
  videos: int
  train: StepPlan
  evaluation: StepPlan | None
  evaluation_batch: int
  views: int

  @property
  def clips_per_second(self) -> tuple[float, float]:
    """At the two times of a step; zeros where they are not known."""
    fast, slow = (self.batch / seconds if seconds else 0.0 for seconds in self.train.seconds)
    return fast, slow

  @property
  def hours(self) -> tuple[float, float]:
    """Of the recipe's steps."""
    fast, slow = (self.steps * seconds / 3600 for seconds in self.train.seconds)
    return fast, slow


def describe(plan: Plan, chip: Chip) -> str:
  """A plan as lines of text."""
  mesh = ' x '.join(f'{name} {size}' for name, size in plan.mesh.items()) or 'one device'
  raised = f" (the recipe's {plan.asked} raised to what the chips divide)" if plan.batch != plan.asked else ''
  lines = [
    f'{plan.topology}: {plan.chips} chips of {limit_of(chip)} and {chip.flops / 1e12:.0f} TFLOP/s; mesh {mesh}',
    f'  batch {plan.batch}{raised}, {plan.batch / plan.chips:g} a chip; learning rate {plan.learning_rate:.3g}',
    '  training step',
    *step_lines(plan.train),
  ]
  if plan.train.fits and plan.train.compute:
    fast, slow = plan.clips_per_second
    lines.append(f'    speed        {_range(slow, fast, "{:.0f}")} clips/s')
    lines.append(
      f'    recipe       {plan.epochs:g} epochs of {plan.videos:,} videos, {plan.steps:,} steps: '
      f'{_range(*plan.hours, "{:.2f}")} h'
    )
  if plan.evaluation:
    lines += [f'  evaluation step, {plan.evaluation_batch} videos of {plan.views} views', *step_lines(plan.evaluation)]
  return '\n'.join(lines)


def memory_of(step: StepPlan) -> str:
  """Whether a step fits, and by how much."""
  spare = (step.available - step.needed) / _GIB
  verdict = f'fits, {spare:.2f} GiB to spare' if step.fits else f'does not fit: {-spare:.2f} GiB too much'
  return f'{step.needed / _GIB:.2f} of {step.available / _GIB:.2f} GiB: {verdict}'


def step_lines(step: StepPlan) -> list[str]:
  """What there is to say of a step, a line each."""
  parts = ', '.join(f'{name} {size / _GIB:.3f}' for name, size in step.memory.items())
  lines = [f'    memory       {memory_of(step)}' + (f'  ({parts})' if parts else '')]
  if not step.memory:
    return lines
  moved = f', {step.moved / _GIB:.4g} GiB moved a chip' if step.moved else ''
  lines.append(f'    work         {step.flops / 1e12:.4g} TFLOP{moved}; compiled in {step.compile_seconds:.0f} s')
  for row in step.traffic:
    lines.append(
      f'    {row.kind:<19}{row.count:>4} x among {row.devices} {"slices" if row.across_slices else "chips"}, '
      f'{row.bytes / 2**20:.4g} MiB{" a chip" if row.across_slices else ""}, '
      f'{1e3 * row.seconds:.3f} ms over the {"network" if row.across_slices else "links"}'
    )
  if step.compute:
    spent = ', '.join(f'{name} {100 * cycles / sum(step.cycles.values()):.0f} %' for name, cycles in _largest(step))
    fast, slow = step.seconds
    best, worst = step.share_of_peak
    lines.append(f'    cycles       {sum(step.cycles.values()) / 1e6:.1f} M: {spent}')
    lines.append(
      f'    time         {_range(1e3 * fast, 1e3 * slow, "{:.1f}")} ms, collectives hidden or not; '
      f'{_range(100 * worst, 100 * best, "{:.0f}")} % of peak'
    )
    if kernels := step.cycles.get('kernels', 0):
      lines.append(f'    kernels      {kernels / 1e6:.1f} M of these cycles by formula, not by the compiler')
  if step.open_loops:
    lines.append(f'    careful      {step.open_loops} loops are counted once: the time is too short')
  return lines


def table(plans: Sequence[Plan]) -> str:
  """Plans as a table in Markdown, a row each."""
  rows = [
    '| chips | mesh | batch | memory GiB | step ms | clips/s | of peak | hours |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for plan in plans:
    step = plan.train
    mesh = ' '.join(f'{name} {size}' for name, size in plan.mesh.items())
    memory = f'{step.needed / _GIB:.2f} of {step.available / _GIB:.2f}' + ('' if step.fits else ', **too much**')
    known = step.fits and bool(step.compute)
    numbers = (
      (
        _milliseconds(step),
        _range(*plan.clips_per_second[::-1], '{:.0f}'),
        _percent(step),
        _range(*plan.hours, '{:.2f}'),
      )
      if known
      else ('-',) * 4
    )
    rows.append(f'| {plan.topology} | {mesh} | {plan.batch} | {memory} | {" | ".join(numbers)} |')
  return '\n'.join(rows)


def to_dict(plan: Plan) -> dict[str, Any]:
  """A plan as JSON can hold it, with what follows from its numbers."""
  values = dataclasses.asdict(plan)
  for name, step in (('train', plan.train), ('evaluation', plan.evaluation)):
    values[name] = step and values[name] | {
      'fits': step.fits, 'collective': step.collective, 'seconds': step.seconds, 'share_of_peak': step.share_of_peak,
    }  # fmt: skip
  return {**values, 'clips_per_second': plan.clips_per_second, 'hours': plan.hours}


def _largest(step: StepPlan) -> list[tuple[str, int]]:
  return sorted(step.cycles.items(), key=lambda item: -item[1])


def _milliseconds(step: StepPlan) -> str:
  fast, slow = step.seconds
  return _range(1e3 * fast, 1e3 * slow, '{:.1f}')


def _percent(step: StepPlan) -> str:
  best, worst = step.share_of_peak
  return _range(100 * worst, 100 * best, '{:.0f}') + ' %'


def _range(low: float, high: float, form: str) -> str:
  """'3' or '3 to 4'."""
  a, b = form.format(low), form.format(high)
  return a if a == b else f'{a} to {b}'
