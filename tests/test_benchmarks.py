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

from benchmarks import attention, decode, inference, peers, train_step, turns
from mevit_jax.config.model import MEViTConfig, count_flops
from mevit_jax.errors import UserError


def test_decode(capsys):
  """Every row is measured or says why not; the original read by us is the original."""
  data = decode.make_video(frames=240, height=64, width=80)
  rows = decode.rows_of(data, frontier=False)
  decode.measure(data, rows, clips=2)
  table = decode.figures(rows, len(data))
  ours, stored = table[-2:]
  assert ours['psnr'] == math.inf
  assert 20 < stored['psnr'] < 60
  assert [row['cpu_ms'] > 0 for row in (ours, stored)] == [True, True]
  decode.show('made here', 'small', table)
  printed = capsys.readouterr().out
  assert all(row['name'] in printed for row in table)


def test_other_frames_are_noticed():
  data = decode.make_video(frames=240, height=64, width=80)

  def read(data, indices, times):
    return decode.read_pyav(data, [index // 2 for index in indices], times)

  row = decode.Row('mixed up', read, data)
  decode.measure(data, [row], clips=1)
  assert 'not those of a plain loop' in row.error


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_tpu_counts_every_block(tmp_path):
  """Twice as many blocks more cost twice as much more: none is hidden in a loop."""
  command = [sys.executable, '-m', 'benchmarks.tpu', '--model=Ti/16', '--frames=2', '--batch=1']
  command += ['--blocks=0+5,0+8,0+14', f'--json={tmp_path / "rows.json"}']
  done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'rows.json').read_text())
  few, more, most = rows
  # Of less than five blocks, what the compiler makes of the first and the last shows.
  for name, within in {'mcycles': 0.05, 'cycles of matmul': 0.05, 'floor': 1e-6, 'kernels': 1e-6}.items():
    assert most[name] - more[name] == pytest.approx(2 * (more[name] - few[name]), rel=within), name
  assert few['kernels'] > 0
  assert 0 < most['share'] < 1
  assert 'libtpu 0.' in done.stdout


ONCE = turns.Timing(1, 'cpu')


@pytest.fixture
def torch():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  return peers.import_torch()


def test_attention(capsys):
  """Every way computes the same, uneven blocks too, and is timed beside the floor."""
  config = MEViTConfig(
    classes=1, frames=2, image_size=(16, 48), width=128, heads=2, mlp_dim=1, block_size=2, dtype='float32'
  )
  rows = attention.measure(config, 1, 1e11, 1e10, ONCE)
  assert [row['name'] for row in rows][:4] == ['floor', 'ours', 'xla', 'jax dpa']
  assert all(row['off_by'] <= 1e-5 and row['forward'] > 0 and row['both'] > 0 for row in rows[1:])
  assert 'ours' in capsys.readouterr().out


def test_floor_of_attention():
  """One block of all 9 patches in 2 frames is 18 tokens; a slow memory or slow arithmetic makes the floor."""
  config = MEViTConfig(classes=1, frames=2, image_size=48, width=128, heads=2, mlp_dim=1, block_size=3, dtype='float32')
  assert attention.floor(config, 5, 1.0, 1e30) == (5 * 4 * 18**2 * 128, 5 * 14 * 18**2 * 128)
  assert attention.floor(config, 5, 1e30, 1.0) == (5 * 4 * 18 * 128 * 4, 5 * 12 * 18 * 128 * 4)


def test_what_computes_something_else_is_not_timed():
  found, wanted = [np.array([1.0, 2.0])], [np.array([1.0, 2.001])]
  assert turns.check('bf16', found, wanted, 'bfloat16') == pytest.approx(0.001 / 2.001)
  with pytest.raises(UserError, match=r'ours is 5\.0e-04 of the largest'):
    turns.check('ours', found, wanted, 'float32')
  with pytest.raises(UserError, match='nan'):
    turns.check('ours', [np.array([np.nan])], [np.array([1.0])], 'float32')


def test_peaks_of_a_gpu(monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(device_kind='NVIDIA H200')])
  assert turns.peaks('bfloat16') == (989e12, 4.8e12)


def test_turns_and_ratio():
  calls = []
  times = turns.take_turns({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, ONCE)
  assert ''.join(calls) == 'abab'
  assert [len(found) for found in times.values()] == [1, 1]
  assert turns.ratio({'ours': [1.0, 2.0, 4.0], 'peer': [3.0, 2.0, 8.0]}, 'ours', 'peer') == 2.0


def small(**changes):
  sizes = {'width': 32, 'heads': 2, 'mlp_dim': 64, 'patch_size': 16, 'image_size': 32, 'frames': 2, 'classes': 5}
  return peers.timesformer_config(motion_blocks=2, dtype='float32', **{**sizes, **changes})


def test_inference(torch):
  ours = {'ours': small(), 'ours plain': small(attention='plain')}
  rows = turns.measure(inference.cases_of(torch, small(), ours, 2, ['eager', 'sdpa']), 2, 1e9, ONCE)
  assert [row['name'] for row in rows] == ['eager', 'sdpa', *ours]
  for row in rows:
    assert row['off_by'] <= 1e-5
    assert row['share'] == pytest.approx(2 * count_flops(small()) / row['seconds'] / 1e9)


@pytest.mark.slow
def test_train_step(torch):
  """Loss and the gradient at the pixels are the peer's; then both go on training."""
  mevit = MEViTConfig(**{**small().__dict__, 'block_size': 2, 'order': 'space_time', 'class_token_in_motion': True})
  ours = {'timesformer': small(), 'timesformer plain': small(attention='plain'), 'mevit': mevit}
  cases = train_step.cases_of(torch, small(), ours, ['eager', 'sdpa'], 2)
  assert cases['timesformer'].off_by <= 1e-5
  assert cases['timesformer plain'].off_by <= 1e-5
  rows = turns.measure(cases, 2, 1e9, ONCE)
  assert [row['name'] for row in rows] == ['eager', 'sdpa', *ours]
  for row in rows:
    assert row['share'] == pytest.approx(6 * count_flops(ours.get(row['name'], small())) / row['seconds'] / 1e9)
