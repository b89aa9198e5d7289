"""Timing of benchmark cases in interleaved rounds, peak rates of the device, and result tables."""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mevit_jax.errors import UserError
from mevit_jax.files import write_json
from mevit_jax.planning.chips import CHIPS

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


class Timing(NamedTuple):
  """Number of timed rounds, and the name of a clock in CLOCKS."""

  rounds: int
  clock: str


class Case(NamedTuple):
  """A function to time.

  Attributes:
    run: runs it once and waits for its result.
    flops: FLOPs of its matrix products.
    error: relative error of its result, see `check_error`; NaN without a reference.
    mib: memory in MiB; NaN if unknown.
    compile_s: compilation time in seconds; NaN if it is not compiled.
  """

  run: Callable[[], Any]
  flops: int
  error: float
  mib: float
  compile_s: float


# Largest error of a result, relative to the largest number of the reference.
TOLERANCES = {'float32': 1e-5, 'bfloat16': 4e-2}


def has_gpu() -> bool:
  """Returns True if JAX sees a GPU; PyTorch then uses it too."""
  return jax.default_backend() == 'gpu'


def check_error(name: str, results: Iterable, expected: Iterable, dtype: str) -> float:
  """Returns the largest difference relative to the largest expected number.

  Raises:
    UserError: the difference is larger than rounding explains.
  """
  error = 0.0
  for result, reference in zip(results, expected, strict=True):
    a, b = np.asarray(result, np.float64), np.asarray(reference, np.float64)
    error = float(np.maximum(error, np.abs(a - b).max() / np.abs(b).max()))  # NaN stays
  if not error <= TOLERANCES[dtype]:
    raise UserError(f'{name} has a relative error of {error:.1e}: it computes a different function and is not timed')
  return error


def compile_function(function: jax.stages.Wrapped, *arguments: Any) -> tuple[jax.stages.Compiled, dict[str, float]]:
  """Compiles a jitted function for these arguments; also returns its `mib` and `compile_s`."""
  start = time.perf_counter()
  result = function.lower(*arguments).compile()
  seconds, memory = time.perf_counter() - start, result.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated buffers count as arguments
  mib = (memory.temp_size_in_bytes + memory.argument_size_in_bytes + outputs) / 2**20
  return result, {'mib': mib, 'compile_s': seconds}


def time_interleaved(cases: dict[str, Callable[[], Any]], timing: Timing) -> dict[str, list[float]]:
  """Runs every case once per round; returns the seconds of each, without the first round, which warms up."""
  now, times = CLOCKS[timing.clock], {name: [] for name in cases}
  for round_ in range(timing.rounds + 1):
    for name, run in cases.items():
      start = now()
      run()
      if round_:
        times[name].append(now() - start)
  return times


def median_speedup(times: dict[str, list[float]], name: str, base: str) -> float:
  """Returns the speed of a case relative to `base`: the median over the rounds."""
  return statistics.median(b / a for a, b in zip(times[name], times[base], strict=True))


HEADER = (
  f'{"batch":>6} {"":17} {"ms":>10} {"clips/s":>9} {"x first":>8} {"of peak":>8} {"error":>8} {"MiB":>8} '
  f'{"compile s":>9}'
)


def measure(cases: dict[str, Case], batch: int, peak: float, timing: Timing, **about) -> list[dict[str, Any]]:
  """Times cases in interleaved rounds and prints a row for each below HEADER.

  Args:
    cases: cases by name; speedups are relative to the first.
    batch: number of clips per run.
    peak: FLOP/s of the device; 0 if unknown.
    timing: rounds and clock.
    about: further entries of every row.
  """
  times, base, rows = time_interleaved({name: case.run for name, case in cases.items()}, timing), next(iter(cases)), []
  for name, case in cases.items():
    seconds, speedup = statistics.median(times[name]), median_speedup(times, name, base)
    share = case.flops / seconds / peak if peak else math.nan
    measured = {'seconds': seconds, 'speedup': speedup, 'share': share}
    properties = {'error': case.error, 'mib': case.mib, 'compile_s': case.compile_s}
    rows.append({**about, 'batch': batch, 'name': name, **measured, **properties})
    print(
      f'{batch:6} {name:17} {1000 * seconds:10.1f} {batch / seconds:9.3f} {speedup:8.2f} {share:8.1%} '
      f'{case.error:8.1e} {case.mib:8.0f} {case.compile_s:9.1f}',
      flush=True,
    )
  return rows


def peak_rates(dtype: str, clock: str = 'wall') -> tuple[float, float]:
  """Returns FLOP/s of matrix products and bytes/s of memory: a GPU's data sheet, a CPU's measurement; 0 if unknown."""
  kind = jax.devices()[0].device_kind.lower()
  for chip in CHIPS.values():
    if chip.platform == 'cuda' and chip.name in kind:
      return chip.flops, chip.hbm_bandwidth  # float32 does not reach this peak
  if has_gpu():
    return 0.0, 0.0
  side, numbers = 2048, 2**25
  x = jnp.ones((side, side), dtype)
  flops = 2 * side**3 / _best(clock, jax.jit(jnp.matmul).lower(x, x).compile(), x, x)
  x = jnp.ones(numbers, jnp.float32)
  return flops, 2 * 4 * numbers / _best(clock, jax.jit(lambda x: x + 1, donate_argnums=0), x)


def _best(clock: str, run: Callable, *args) -> float:
  """Returns the seconds of the fastest of eight calls; a single argument may be donated: the result replaces it."""
  times = []
  for _ in range(8):
    start = CLOCKS[clock]()
    result = jax.block_until_ready(run(*args))
    times.append(CLOCKS[clock]() - start)
    args = (result, *args[1:]) if len(args) == 1 else args
  return min(times)


def describe_device() -> str:
  """Describes the device, the load of the machine and the versions."""
  cores = f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}'
  return f'{jax.devices()[0].device_kind}, {cores}, jax {jax.__version__}, Python {sys.version.split()[0]}'


def define_flags() -> None:
  """Defines the flags that these benchmarks share; called by the scripts only, so that tests can import all of them."""
  flags.DEFINE_list('frames', '8', 'Frames per clip; one or more numbers.')
  flags.DEFINE_enum('dtype', '', ['', 'float32', 'bfloat16'], 'Default: float32, and bfloat16 on a GPU.')
  flags.DEFINE_integer('rounds', 7, 'Timed rounds.', lower_bound=1)
  flags.DEFINE_enum('clock', 'wall', list(CLOCKS), 'Wall-clock time, or CPU time of all threads.')
  flags.DEFINE_string('json', '', 'JSON file to write the results to.')


def parse_timing() -> Timing:
  """Returns the rounds and the clock that the flags set."""
  return Timing(flags.FLAGS.rounds, flags.FLAGS.clock)


def parse_dtype() -> str:
  """Returns the dtype that --dtype sets: by default bfloat16 on a GPU, float32 elsewhere."""
  return flags.FLAGS.dtype or ('bfloat16' if has_gpu() else 'float32')


def write_results(rows: list[dict], **about) -> None:
  """Writes the rows to the file that --json names, if any."""
  if flags.FLAGS.json:
    about = {'device': describe_device(), 'dtype': parse_dtype(), 'clock': flags.FLAGS.clock, **about}
    write_json(flags.FLAGS.json, {**about, 'rows': rows})
