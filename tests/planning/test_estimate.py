"""Bandwidth, transfer times and memory, against values computed by hand."""

import dataclasses

import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.planning import chips, report
from mevit_jax.planning.estimate import StepPlan, Traffic, kernel_cycles, needed_memory, seconds_of
from mevit_jax.planning.hlo import Collective, Kernel

V5E = chips.CHIPS['v5e']


@dataclasses.dataclass(frozen=True)
class Device:
  """Fake device."""

  coords: tuple[int, int, int]
  process_index: int = 0


def grid(rows, columns):
  return [Device((x, y, 0)) for y in range(rows) for x in range(columns)]


def gather(size, times=1):
  return Collective('all-gather', ((size,),), size, np.zeros((0, 0), int), times)


@pytest.mark.parametrize(
  ('name', 'group', 'links'),
  [
    ('v5e:4x4', grid(4, 4), 2),  # two dimensions without wrap-around links
    ('v5e:4x4', grid(1, 4), 1),
    ('v5e:16x16', grid(16, 16), 4),  # two dimensions with wrap-around links
    ('v5e:16x16', grid(2, 16), 3),  # one dimension with wrap-around links, one without
  ],
)
def test_bandwidth_of_a_torus(name, group, links):
  topology = chips.parse(name)
  assert chips.bandwidth(V5E, topology, group) == links * V5E.link
  share = (len(group) - 1) / len(group)
  assert seconds_of(gather(10**9, 2), topology, group) == pytest.approx(2e9 * share / (links * V5E.link))


def test_each_chip_sends_its_shard_between_slices():
  reduce = Collective('all-reduce', ((10**9,),), 10**9, np.zeros((0, 0), int), 2, slices=4)
  assert seconds_of(reduce, chips.parse('v5e:4x4'), grid(4, 4)) == pytest.approx(2 * 2 * 3 / 4 * 10**9 / V5E.network)


def test_gpus_send_through_the_switch_or_the_network():
  chip, topology = chips.CHIPS['h200'], chips.parse('h200:2x8')
  one = [Device((0, 0, 0), process_index=0)] * 8
  assert chips.bandwidth(chip, topology, one) == chip.link
  assert chips.bandwidth(chip, topology, [*one, Device((0, 0, 0), process_index=1)]) == chip.network


@pytest.mark.parametrize('name', ['v5e', 'v5e:', 'v9:4x4', 'v5e:4by4', '16x16'])
def test_invalid_topology_is_refused(name):
  with pytest.raises(UserError, match='is not valid: use CHIP:SIZE with CHIP one of v5e, v5p, v6e'):
    chips.parse(name)


def test_missing_compiler_error_names_the_requirements_file(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda name: None)
  for name, package in (('v5e:4x4', 'libtpu'), ('h200:8', r'jax\[cuda13\]')):
    with pytest.raises(UserError, match=f'compiling for {name} needs {package}: pip install -r requirements-plan.txt'):
      chips.devices_of(chips.parse(name))


def test_out_of_memory_error_is_parsed():
  message = 'Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.'
  assert needed_memory(message, 2**30) == 20.5 * 2**30
  message = 'the total memory required for HLO temporaries (2.57T) exceeds available HBM (15.75G).'
  assert needed_memory(message, 2**40) == 3.57 * 2**40
  assert needed_memory('INTERNAL: something else', 0) is None
  step = StepPlan({}, 20.5 * 2**30, 15.75 * 2**30, 1.0, 1.0)
  assert not step.fits
  assert report.describe_memory(step) == '20.50 of 15.75 GiB: out of memory by 4.75 GiB'


def test_step_time_with_and_without_overlapped_collectives():
  traffic = (Traffic('all-reduce', 16, False, 1, 100, 0.25), Traffic('all-reduce', 2, True, 2, 2**21, 0.5))
  step = StepPlan({'parameters': 1}, 1, 2, 100.0, 400.0, compute=0.5, cycles={'matmul': 3}, traffic=traffic)
  assert step.seconds == (0.75, 1.25)
  assert step.mfu == pytest.approx((1 / 3, 0.2))
  assert '2 x over 2 slices, 2 MiB per chip, 500.000 ms on the network' in '\n'.join(report.step_lines(step))
  assert StepPlan({'parameters': 1}, 1, 2, 100.0, 400.0, traffic=traffic).seconds == (0.0, 0.0)


def test_kernel_cycles_are_a_roofline():
  """The larger of FLOPs and bytes at 0.6 of peak: 1 ms of v5e's matrix units, and 2 ms of its HBM bandwidth."""
  compute_bound, memory_bound = Kernel('a', 197 * 10**9, 819, 3), Kernel('b', 197, 2 * 819 * 10**6, 1)
  assert kernel_cycles([compute_bound], V5E) == pytest.approx(3 * 1.5e6 / 0.6, rel=1e-6)
  assert kernel_cycles([compute_bound, memory_bound], V5E) == pytest.approx(5 * 1.5e6 / 0.6, rel=1e-6)
