"""Benchmarks check the timed function first, and their tables are complete."""

import importlib.util
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import attention, decode, inference, timing, torch_baselines, train_step
from mevit_jax.config.model import MEViTConfig, count_flops
from mevit_jax.errors import UserError


def test_decode_table(capsys):
  """Every row has a measurement or a reason; our reader returns the frames of the original."""
  data = decode.make_video(frames=240, height=64, width=80)
  rows = decode.make_rows(data, frontier=False)
  decode.measure(data, rows, clips=2)
  table = decode.figures(rows, len(data))
  ours, stored = table[-2:]
  assert ours['psnr'] == math.inf
  assert 20 < stored['psnr'] < 60
  assert [row['cpu_ms'] > 0 for row in (ours, stored)] == [True, True]
  decode.show('synthetic', 'small', table)
  printed = capsys.readouterr().out
  assert all(row['name'] in printed for row in table)


def test_a_reader_that_returns_wrong_frames_is_refused():
  data = decode.make_video(frames=240, height=64, width=80)

  def read(data, indices, times):
    return decode.read_pyav(data, [index // 2 for index in indices], times)

  row = decode.Row('wrong frames', read, data)
  decode.measure(data, [row], clips=1)
  assert 'differ from those of a plain loop' in row.error


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_tpu_counts_every_block(tmp_path):
  """The cost grows linearly with the number of blocks: none is hidden in a loop."""
  command = [sys.executable, '-m', 'benchmarks.tpu', '--model=Ti/16', '--frames=2', '--batch=1']
  command += ['--blocks=0+5,0+8,0+14', f'--json={tmp_path / "rows.json"}']
  result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  rows = json.loads((tmp_path / 'rows.json').read_text())
  few, more, most = rows
  # With fewer than five blocks, the first and the last one dominate the fusions.
  for name, within in {'mcycles': 0.05, 'cycles of matmul': 0.05, 'floor': 1e-6, 'kernels': 1e-6}.items():
    assert most[name] - more[name] == pytest.approx(2 * (more[name] - few[name]), rel=within), name
  assert few['kernels'] > 0
  assert 0 < most['share'] < 1
  assert 'libtpu 0.' in result.stdout


ONCE = timing.Timing(1, 'cpu')


@pytest.fixture
def torch():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  return torch_baselines.import_torch()


def test_attention_table(capsys):
  """All implementations agree, also for blocks of unequal size, and are timed next to the lower bound."""
  config = MEViTConfig(
    classes=1, frames=2, image_size=(16, 48), width=128, heads=2, mlp_dim=1, block_size=2, dtype='float32'
  )
  rows = attention.measure(config, 1, 1e11, 1e10, ONCE)
  assert [row['name'] for row in rows][:4] == ['floor', 'ours', 'xla', 'jax dpa']
  assert all(row['error'] <= 1e-5 and row['forward'] > 0 and row['both'] > 0 for row in rows[1:])
  assert 'ours' in capsys.readouterr().out


def test_lower_bound_of_attention_time():
  """One block of 9 patches in 2 frames has 18 tokens; the bound is set by memory bandwidth or by FLOPs."""
  config = MEViTConfig(classes=1, frames=2, image_size=48, width=128, heads=2, mlp_dim=1, block_size=3, dtype='float32')
  assert attention.floor(config, 5, 1.0, 1e30) == (5 * 4 * 18**2 * 128, 5 * 14 * 18**2 * 128)
  assert attention.floor(config, 5, 1e30, 1.0) == (5 * 4 * 18 * 128 * 4, 5 * 12 * 18 * 128 * 4)


def test_functions_with_different_results_are_not_timed():
  result, expected = [np.array([1.0, 2.0])], [np.array([1.0, 2.001])]
  assert timing.check_error('bf16', result, expected, 'bfloat16') == pytest.approx(0.001 / 2.001)
  with pytest.raises(UserError, match=r'ours has a relative error of 5\.0e-04'):
    timing.check_error('ours', result, expected, 'float32')
  with pytest.raises(UserError, match='nan'):
    timing.check_error('ours', [np.array([np.nan])], [np.array([1.0])], 'float32')


def test_peak_rates_of_a_gpu(monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(device_kind='NVIDIA H200')])
  assert timing.peak_rates('bfloat16') == (989e12, 4.8e12)


def test_cases_are_interleaved():
  calls = []
  times = timing.time_interleaved({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, ONCE)
  assert ''.join(calls) == 'abab'
  assert [len(seconds) for seconds in times.values()] == [1, 1]
  assert timing.median_speedup({'ours': [1.0, 2.0, 4.0], 'baseline': [3.0, 2.0, 8.0]}, 'ours', 'baseline') == 2.0


def small(**changes):
  sizes = {'width': 32, 'heads': 2, 'mlp_dim': 64, 'patch_size': 16, 'image_size': 32, 'frames': 2, 'classes': 5}
  return torch_baselines.timesformer_config(motion_blocks=2, dtype='float32', **{**sizes, **changes})


def test_inference_table(torch):
  ours = {'ours': small(), 'ours plain': small(attention='plain')}
  rows = timing.measure(inference.make_cases(torch, small(), ours, 2, ['eager', 'sdpa']), 2, 1e9, ONCE)
  assert [row['name'] for row in rows] == ['eager', 'sdpa', *ours]
  for row in rows:
    assert row['error'] <= 1e-5
    assert row['share'] == pytest.approx(2 * count_flops(small()) / row['seconds'] / 1e9)


@pytest.mark.slow
def test_train_step_table(torch):
  """Loss and pixel gradient equal the baseline's before both are timed."""
  mevit = MEViTConfig(
    **{**small().__dict__, 'block_size': 2, 'attention_order': 'space_time', 'class_token_in_motion': True}
  )
  ours = {'timesformer': small(), 'timesformer plain': small(attention='plain'), 'mevit': mevit}
  cases = train_step.make_cases(torch, small(), ours, ['eager', 'sdpa'], 2)
  assert cases['timesformer'].error <= 1e-5
  assert cases['timesformer plain'].error <= 1e-5
  rows = timing.measure(cases, 2, 1e9, ONCE)
  assert [row['name'] for row in rows] == ['eager', 'sdpa', *ours]
  for row in rows:
    assert row['share'] == pytest.approx(6 * count_flops(ours.get(row['name'], small())) / row['seconds'] / 1e9)
