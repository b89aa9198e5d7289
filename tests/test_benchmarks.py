import math

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
