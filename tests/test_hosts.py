"""Many hosts: real processes that train together, fail together, and go on as one; how they find each other."""

import json
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mevit_jax import train
from mevit_jax.errors import UserError
from mevit_jax.parallel import distributed
from tests.helpers.hosts import ends
from tests.helpers.workdirs import MEASURED, NAME, after

pytestmark = pytest.mark.usefixtures('compile_once')


def stored(workdir):
  """The newest checkpoint's step, its parameters and optimiser state."""
  newest = max(
    (path for path in (workdir / 'checkpoints').iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
  )
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = []
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ('params', 'opt_state'):
      shapes = checkpointer.metadata(newest / item).item_metadata.tree
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
      found.append(jax.tree.map(np.asarray, checkpointer.restore(newest / item, shapes)))
  return int(newest.name), *found


def assert_same_run(workdir, other):
  """Bit for bit: parameters, optimiser state, metrics that are no speed, and all that an evaluation writes."""
  (step, *trees), (other_step, *others) = stored(workdir), stored(other)
  assert step == other_step
  assert jax.tree.map(np.ndarray.tobytes, trees) == jax.tree.map(np.ndarray.tobytes, others)
  lines, other_lines = ((folder / 'metrics.jsonl').read_text().splitlines() for folder in (workdir, other))
  for line, other_line in zip(map(json.loads, lines), map(json.loads, other_lines), strict=True):
    assert line.keys() == other_line.keys()
    assert all(line[name] == other_line[name] for name in line if name not in MEASURED)
  assert_same_evaluation(workdir, other)


def assert_same_evaluation(workdir, other):
  folder, other_folder = (path / 'evaluation' / NAME for path in (workdir, other))
  assert {path.name for path in folder.iterdir()} == {path.name for path in other_folder.iterdir()}
  for name in ('results.json', 'predictions.csv'):
    assert (folder / name).read_bytes() == (other_folder / name).read_bytes()
  with np.load(folder / 'logits.npz') as arrays, np.load(other_folder / 'logits.npz') as other_arrays:
    for name in arrays:
      np.testing.assert_array_equal(arrays[name], other_arrays[name])


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory, compile_once):
  """A run on two devices of one process that nothing interrupts."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  train.train(tiny(**{'mesh.data': 2}), str(workdir))
  return workdir


def test_two_processes_fail_together_and_one_goes_on(whole, tiny, start, tmp_path):
  """An exception in process 1 ends both, each with its reason; one process then ends as if nothing had been."""
  first, second = ends(start([tiny()] * 2, tmp_path / 'run', accident=(1, 'raise', 5)))
  assert (first.status, second.status) == (1, 1)
  assert "OSError: [Errno 5] Input/output error: '/a/bad/disk'" in first.errors
  assert 'process 1 of 2' in first.errors
  assert 'Traceback' not in first.errors
  assert "OSError: [Errno 5] Input/output error: '/a/bad/disk'" in second.errors
  assert max(first.time, second.time) - second.accident < 60
  assert 'step 4/6' in first.output
  assert 'step' not in second.output
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', whole)


@pytest.mark.slow
def test_one_process_is_stopped_and_two_go_on(whole, tiny, start, tmp_path):
  run = after(2, whole, tmp_path / 'run')
  for process in ends(start([tiny()] * 2, run)):
    assert process.status == 0, process.errors
  assert_same_run(run, whole)
  shutil.copytree(run, tmp_path / 'again', ignore=shutil.ignore_patterns('evaluation'))
  for process in ends(start([tiny()] * 2, tmp_path / 'again', mode='evaluate')):
    assert process.status == 0, process.errors
  assert_same_evaluation(tmp_path / 'again', whole)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('process', 'what', 'words'),
  [(1, 'kill', 'stopped sending heartbeats'), (0, 'kill', 'coordination service'), (1, 'stop', 'heartbeats')],
)
def test_a_process_that_goes_without_a_word_ends_the_other(whole, tiny, start, tmp_path, process, what, words):
  processes = start([tiny()] * 2, tmp_path / 'run', accident=(process, what, 4))
  (other,) = ends([processes[1 - process]])
  if what == 'stop':
    processes[process].send_signal(signal.SIGCONT)
  (gone,) = ends([processes[process]])
  assert other.status != 0
  assert words in other.errors
  assert other.time - gone.accident < 60
  print(f'{what} {process}: the other one ended after {other.time - gone.accident:.1f} s')
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', whole)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_both(whole, tiny, start, tmp_path):
  first, second = ends(
    start([tiny(**{'training.save_every': 100})] * 2, tmp_path / 'run', accident=(1, 'slow term', 2))
  )
  assert (first.status, second.status) == (143, 143)
  assert 'stopped by SIGTERM at step' in first.output
  assert stored(tmp_path / 'run')[0] < 6
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', whole)


@pytest.mark.slow
def test_a_signal_while_it_evaluates_ends_both(whole, tiny, start, tmp_path):
  settings = [tiny(**{'evaluation.batch_size': 2})] * 2
  first, second = ends(start(settings, tmp_path / 'run', accident=(1, 'slow term', 8)))  # 6 steps, and 6 batches
  assert (first.status, second.status) == (143, 143)
  assert 'stopped by SIGTERM at step 6, saved' in first.output
  assert max(first.time, second.time) - second.accident < 60
  assert not (tmp_path / 'run/evaluation').exists()
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', whole)


@pytest.mark.slow
def test_processes_that_would_train_other_runs(tiny, start, tmp_path):
  settings = [tiny(), tiny(**{'training.seed': 1})]
  for process in ends(start(settings, tmp_path / 'run')):
    assert process.status == 1
    assert 'process 1 has another run than process 0' in process.errors
    assert 'recipe.training.seed: 0, and 1' in process.errors
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_process_that_never_comes(start, tiny, tmp_path):
  first, second = start([tiny()] * 2, tmp_path / 'run', accident=(1, 'late', 0))
  second.kill()
  (alone,) = ends([first])
  assert alone.status == 1
  assert 'error: process 0 of 2 did not meet the others at 127.0.0.1' in alone.errors
  assert 'Traceback' not in alone.errors


# How they find each other: found() reads the environment, and asks nobody.


def test_alone():
  assert distributed.found(environ={}) is None
  assert distributed.found(environ={'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}) is None  # sbatch itself, before srun
  assert distributed.found(processes=1, environ={}) is None


def test_a_list_of_hosts():
  given = {'JAX_COORDINATOR_ADDRESS': 'a:1234', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}
  expected = {
    'coordinator_address': 'a:1234', 'num_processes': 4, 'process_id': 3, 'local_device_ids': None,
    'cluster_detection_method': 'deactivate',
  }  # fmt: skip
  assert distributed.found(environ=given) == expected
  assert distributed.found('a:1234', 4, 3, environ={}) == expected
  assert distributed.found(process_id=0, environ=given) == {**expected, 'process_id': 0}  # a flag comes first


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('a:1', 2, None), '--process_id None: give all three'),
    ((None, 2, 1), '--coordinator is None'),
    (('a', 2, 1), 'must be HOST:PORT'),
    (('a:1', 2, 2), 'of 2 processes: they count from 0'),
  ],
)
def test_processes_that_do_not_fit_together(arguments, message):
  with pytest.raises(UserError, match=message):
    distributed.found(*arguments, environ={})


@pytest.mark.parametrize(
  ('nodes', 'first'),
  [('gpu7', 'gpu7'), ('gpu7,cpu1', 'gpu7'), ('gpu[007-011,20]', 'gpu007'), ('gpu[3,5]-ib,m2', 'gpu3')],
)
def test_slurm(nodes, first):
  step = {
    'SLURM_JOB_ID': '4097', 'SLURM_STEP_NODELIST': nodes, 'SLURM_STEP_NUM_NODES': '2', 'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1', 'SLURM_LOCALID': '0',
  }  # fmt: skip
  arguments = distributed.found(environ=step)
  assert arguments['coordinator_address'] == f'{first}:61441'
  assert (arguments['num_processes'], arguments['process_id']) == (2, 1)
  assert arguments['local_device_ids'] is None  # one process a machine: all that it sees


def test_slurm_with_a_process_for_each_gpu():
  step = {
    'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'a,b', 'SLURM_STEP_NUM_NODES': '2', 'SLURM_NTASKS': '8',
    'SLURM_PROCID': '6', 'SLURM_LOCALID': '2',
  }  # fmt: skip
  assert distributed.found(environ={**step, 'CUDA_VISIBLE_DEVICES': '0,1,2,3'})['local_device_ids'] == [2]
  assert distributed.found(environ={**step, 'CUDA_VISIBLE_DEVICES': '2'})['local_device_ids'] is None  # dealt out


@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    ({}, {}),  # a TPU VM: jax asks its metadata
    ({'TPU_SKIP_MDS_QUERY': '1'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}, {}),
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_SKIP_MDS_QUERY': 'true'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, {}),
  ],
)
def test_tpu(monkeypatch, environ, expected):
  monkeypatch.setattr(distributed, '_has_tpu', lambda: True)
  assert distributed.found(environ=environ) == expected


def test_one_process_has_gathered_at_once():
  assert distributed.allgather_bytes(b'mine') == [b'mine']
