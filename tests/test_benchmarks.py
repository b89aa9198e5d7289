import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import decode


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
  """Doubling the blocks doubles what they cost: none is hidden in a loop."""
  command = [sys.executable, '-m', 'benchmarks.tpu', '--model=Ti/16', '--frames=2', '--batch=1', '--blocks=0+1,0+2,0+4']
  command += ['--attention=auto,plain', f'--json={tmp_path / "rows.json"}']
  done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'rows.json').read_text())
  for attention in ('auto', 'plain'):
    one, two, four = (row for row in rows if row['attention'] == attention)
    for name in ('mcycles', 'floor', *(['kernels'] if attention == 'auto' else [])):
      # A fifth is what tilings of so small arrays differ by; a loop counted once would be less than half.
      assert four[name] - two[name] == pytest.approx(2 * (two[name] - one[name]), rel=0.25), (attention, name)
    assert (one['kernels'] > 0) == (attention == 'auto')
    assert 0 < four['share'] < 1
  assert 'libtpu 0.' in done.stdout
