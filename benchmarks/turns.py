"""What the benchmarks beside PyTorch share: cases that take turns, clocks, peaks, and rows of figures."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mevit_jax.errors import UserError
from mevit_jax.planning.chips import CHIPS

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


class Timing(NamedTuple):
  """How often each is timed, and by which of CLOCKS."""

  rounds: int
  clock: str


class Case(NamedTuple):
  """What is timed, and what is known of it before.

  Attributes:
    run: does it once, to its end.
    flops: of its matrix products.
    off_by: see `check`; NaN where there is nothing to compare with.
    mib: of memory that it takes.
    compile_s: seconds to compile it.
  """

  run: Callable[[], Any]
  flops: int
  off_by: float
  mib: float
  compile_s: float


# As far apart as two results may be, relative to the largest number.
TOLERANCES = {'float32': 1e-5, 'bfloat16': 4e-2}


def on_gpu() -> bool:
  """Whether JAX sees a GPU, which is then PyTorch's device too."""
  return jax.default_backend() == 'gpu'


def check(name: str, found: Iterable, wanted: Iterable, dtype: str) -> float:
  """The largest difference relative to the largest number; a UserError if that is no rounding."""
  worst = 0.0
  for one, other in zip(found, wanted, strict=True):
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    worst = float(np.maximum(worst, np.abs(a - b).max() / np.abs(b).max()))  # NaN stays
  if not worst <= TOLERANCES[dtype]:
    raise UserError(f'{name} is {worst:.1e} of the largest number off: what computes something else is not timed')
  return worst


def compiled(function: jax.stages.Wrapped, *arguments: Any) -> tuple[jax.stages.Compiled, dict[str, float]]:
  """A function of ours for these arguments, and its `mib` and `compile_s`."""
  start = time.perf_counter()
  result = function.lower(*arguments).compile()
  seconds, used = time.perf_counter() - start, result.memory_analysis()
  made = used.output_size_in_bytes - used.alias_size_in_bytes  # what is donated is an argument already
  mib = (used.temp_size_in_bytes + used.argument_size_in_bytes + made) / 2**20
  return result, {'mib': mib, 'compile_s': seconds}


def take_turns(cases: dict[str, Callable[[], Any]], timing: Timing) -> dict[str, list[float]]:
  """Seconds of each case in every round, one after the other; a first round does not count."""
  now, times = CLOCKS[timing.clock], {name: [] for name in cases}
  for round_ in range(timing.rounds + 1):
    for name, run in cases.items():
      start = now()
      run()
      if round_:
        times[name].append(now() - start)
  return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
  """How many times as fast as `base`: the median over the rounds."""
  return statistics.median(b / a for a, b in zip(times[name], times[base], strict=True))


HEAD = (
  f'{"batch":>6} {"":17} {"ms":>10} {"clips/s":>9} {"x first":>8} {"of peak":>8} {"off by":>8} {"MiB":>8} '
  f'{"compile s":>9}'
)


def measure(cases: dict[str, Case], batch: int, peak: float, timing: Timing, **about) -> list[dict[str, Any]]:
  """Times cases of `batch` clips in turns; a row for each, with `about`, printed below HEAD: the first is the base."""
  times, base, rows = take_turns({name: case.run for name, case in cases.items()}, timing), next(iter(cases)), []
  for name, case in cases.items():
    seconds, faster = statistics.median(times[name]), ratio(times, name, base)
    share = case.flops / seconds / peak if peak else math.nan
    known = {'off_by': case.off_by, 'mib': case.mib, 'compile_s': case.compile_s}
    found = {'seconds': seconds, 'times_first_peer': faster, 'share': share}
    rows.append({**about, 'batch': batch, 'name': name, **found, **known})
    print(
      f'{batch:6} {name:17} {1000 * seconds:10.1f} {batch / seconds:9.3f} {faster:8.2f} {share:8.1%} '
      f'{case.off_by:8.1e} {case.mib:8.0f} {case.compile_s:9.1f}',
      flush=True,
    )
  return rows


def peaks(dtype: str, clock: str = 'wall') -> tuple[float, float]:
  """FLOP/s of matrix products and bytes/s of memory: a GPU's by its data sheet, else measured here; 0 if unknown."""
  kind = jax.devices()[0].device_kind.lower()
  for chip in CHIPS.values():
    if chip.platform == 'cuda' and chip.name in kind:
      return chip.flops, chip.hbm_bandwidth  # float32 has no such peak
  if on_gpu():
    return 0.0, 0.0
  side, numbers = 2048, 2**25
  x = jnp.ones((side, side), dtype)
  flops = 2 * side**3 / _best(clock, jax.jit(jnp.matmul).lower(x, x).compile(), x, x)
  x = jnp.ones(numbers, jnp.float32)
  return flops, 2 * 4 * numbers / _best(clock, jax.jit(lambda x: x + 1, donate_argnums=0), x)


def _best(clock: str, run: Callable, *args) -> float:
  """Seconds of the fastest of some calls; what is donated comes back as the result."""
  times = []
  for _ in range(8):
    start = CLOCKS[clock]()
    result = jax.block_until_ready(run(*args))
    times.append(CLOCKS[clock]() - start)
    args = (result, *args[1:]) if len(args) == 1 else args
  return min(times)


def describe() -> str:
  """The device, and what else says how to read the figures."""
  cores = f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}'
  return f'{jax.devices()[0].device_kind}, {cores}, jax {jax.__version__}, Python {sys.version.split()[0]}'


def define_flags() -> None:
  """The flags that these benchmarks share; defined where one is run, so that tests may import them all."""
  flags.DEFINE_list('frames', '8', 'Frames of a clip, one number or more.')
  flags.DEFINE_enum('dtype', '', ['', 'float32', 'bfloat16'], 'Default: float32, and bfloat16 on a GPU.')
  flags.DEFINE_integer('rounds', 7, 'How often each is timed.', lower_bound=1)
  flags.DEFINE_enum('clock', 'wall', list(CLOCKS), 'Time on the clock, or CPU time of all threads.')
  flags.DEFINE_string('json', '', 'A file to write the figures to.')


def timing() -> Timing:
  """As the flags say."""
  return Timing(flags.FLAGS.rounds, flags.FLAGS.clock)


def chosen_dtype() -> str:
  """Of the computation, as the flag says or as suits the device."""
  return flags.FLAGS.dtype or ('bfloat16' if on_gpu() else 'float32')


def write(rows: list[dict], **about) -> None:
  """The figures as JSON, if --json names a file."""
  if flags.FLAGS.json:
    about = {'on': describe(), 'dtype': chosen_dtype(), 'clock': flags.FLAGS.clock, **about}
    Path(flags.FLAGS.json).write_text(json.dumps({**about, 'rows': rows}, indent=2) + '\n')
