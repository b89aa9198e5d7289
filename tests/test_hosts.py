"""Multi-process runs: training, failure propagation, resuming with another number of processes, cluster detection."""

import json
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax._src import clusters

from mevit_jax import train
from mevit_jax.errors import UserError
from mevit_jax.parallel import distributed
from tests.helpers.hosts import wait
from tests.helpers.workdirs import MEASURED, NAME, after

pytestmark = pytest.mark.usefixtures('compile_once')


def read_newest_checkpoint(workdir):
  """Returns the step, the parameters and the optimizer state of the newest checkpoint."""
  newest = max(
    (path for path in (workdir / 'checkpoints').iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
  )
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  items = []
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ('params', 'opt_state'):
      shapes = checkpointer.metadata(newest / item).item_metadata.tree
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
      items.append(jax.tree.map(np.asarray, checkpointer.restore(newest / item, shapes)))
  return int(newest.name), *items


def assert_same_run(workdir, other):
  """Compares bitwise: parameters, optimizer state, metrics except speed, and the files of an evaluation."""
  (step, *trees), (other_step, *others) = read_newest_checkpoint(workdir), read_newest_checkpoint(other)
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
def uninterrupted(tiny, tmp_path_factory, compile_once):
  """The workdir of an uninterrupted run on two devices of one process."""
  workdir = tmp_path_factory.mktemp('runs') / 'uninterrupted'
  train.train(tiny(**{'mesh.data': 2}), str(workdir))
  return workdir


def test_failure_ends_both_processes_and_one_process_resumes(uninterrupted, tiny, start, tmp_path):
  """Both print the exception of process 1; a single process then completes the same run."""
  first, second = wait(start([tiny()] * 2, tmp_path / 'run', fault=(1, 'raise', 5)))
  assert (first.status, second.status) == (1, 1)
  assert "OSError: [Errno 5] Input/output error: '/a/bad/disk'" in first.errors
  assert 'process 1 of 2' in first.errors
  assert 'Traceback' not in first.errors
  assert "OSError: [Errno 5] Input/output error: '/a/bad/disk'" in second.errors
  assert max(first.time, second.time) - second.fault_time < 60
  assert 'step 4/6' in first.output
  assert 'step' not in second.output
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', uninterrupted)


@pytest.mark.slow
def test_run_of_one_process_resumes_with_two(uninterrupted, tiny, start, tmp_path):
  run = after(2, uninterrupted, tmp_path / 'run')
  for process in wait(start([tiny()] * 2, run)):
    assert process.status == 0, process.errors
  assert_same_run(run, uninterrupted)
  shutil.copytree(run, tmp_path / 'copy', ignore=shutil.ignore_patterns('evaluation'))
  for process in wait(start([tiny()] * 2, tmp_path / 'copy', mode='evaluate')):
    assert process.status == 0, process.errors
  assert_same_evaluation(tmp_path / 'copy', uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('process', 'kind', 'message'),
  [(1, 'kill', 'stopped sending heartbeats'), (0, 'kill', 'coordination service'), (1, 'stop', 'heartbeats')],
)
def test_killed_process_ends_the_other(uninterrupted, tiny, start, tmp_path, process, kind, message):
  processes = start([tiny()] * 2, tmp_path / 'run', fault=(process, kind, 4))
  (other,) = wait([processes[1 - process]])
  if kind == 'stop':
    processes[process].send_signal(signal.SIGCONT)
  (faulty,) = wait([processes[process]])
  assert other.status != 0
  assert message in other.errors
  assert other.time - faulty.fault_time < 60
  print(f'{kind} {process}: the other process ended after {other.time - faulty.fault_time:.1f} s')
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', uninterrupted)


@pytest.mark.slow
def test_signal_to_one_process_saves_and_ends_both(uninterrupted, tiny, start, tmp_path):
  first, second = wait(start([tiny(**{'training.save_every': 100})] * 2, tmp_path / 'run', fault=(1, 'slow term', 2)))
  assert (first.status, second.status) == (143, 143)
  assert 'stopped by SIGTERM at step' in first.output
  assert read_newest_checkpoint(tmp_path / 'run')[0] < 6
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', uninterrupted)


@pytest.mark.slow
def test_signal_during_evaluation_ends_both(uninterrupted, tiny, start, tmp_path):
  configs = [tiny(**{'evaluation.batch_size': 2})] * 2
  first, second = wait(start(configs, tmp_path / 'run', fault=(1, 'slow term', 8)))  # 6 steps, then 6 batches
  assert (first.status, second.status) == (143, 143)
  assert 'stopped by SIGTERM at step 6, checkpoint saved' in first.output
  assert max(first.time, second.time) - second.fault_time < 60
  assert not (tmp_path / 'run/evaluation').exists()
  train.train(tiny(**{'mesh.data': 2}), str(tmp_path / 'run'))
  assert_same_run(tmp_path / 'run', uninterrupted)


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(tiny, start, tmp_path):
  configs = [tiny(), tiny(**{'training.seed': 1})]
  for process in wait(start(configs, tmp_path / 'run')):
    assert process.status == 1
    assert 'process 1 has ' in process.errors
    assert 'config.training.seed: 0 -> 1' in process.errors
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_process_that_never_connects(start, tiny, tmp_path):
  first, second = start([tiny()] * 2, tmp_path / 'run', fault=(1, 'late', 0))
  second.kill()
  (result,) = wait([first])
  assert result.status == 1
  assert 'error: process 0 of 2 could not connect to the coordinator at 127.0.0.1' in result.errors
  assert 'Traceback' not in result.errors


# Cluster detection reads the environment, and queries nothing.


def test_single_process():
  assert distributed.detect_cluster(environ={}) is None
  assert (
    distributed.detect_cluster(environ={'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}) is None
  )  # sbatch script, outside of srun
  assert distributed.detect_cluster(processes=1, environ={}) is None


def test_explicit_cluster():
  environ = {'JAX_COORDINATOR_ADDRESS': 'a:1234', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}
  expected = {
    'coordinator_address': 'a:1234', 'num_processes': 4, 'process_id': 3, 'local_device_ids': None,
    'cluster_detection_method': 'deactivate',
  }  # fmt: skip
  assert distributed.detect_cluster(environ=environ) == expected
  assert distributed.detect_cluster('a:1234', 4, 3, environ={}) == expected
  assert distributed.detect_cluster(process_id=0, environ=environ) == {
    **expected,
    'process_id': 0,
  }  # flags take precedence


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('a:1', 2, None), '--process_id None: set all three'),
    ((None, 2, 1), '--coordinator is None'),
    (('a', 2, 1), 'use HOST:PORT'),
    (('a:1', 2, 2), '--process_id 2 is out of range for 2 processes: use 0 to 1'),
  ],
)
def test_inconsistent_cluster_arguments_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    distributed.detect_cluster(*arguments, environ={})


def slurm_step(**changes):
  """Returns the variables that srun sets in a process of a job step: by default one process on each of two nodes."""
  return {
    'SLURM_JOB_ID': '4097', 'SLURM_STEP_NODELIST': 'gpu[007-008]', 'SLURM_STEP_NUM_NODES': '2', 'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1', 'SLURM_LOCALID': '0', **changes,
  }  # fmt: skip


def arguments_used_by_jax(monkeypatch, environ):
  """Returns (address, processes, process id, device ids) that jax derives from our arguments and the environment."""
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  arguments = distributed.detect_cluster(environ=environ)
  return clusters.ClusterEnv.auto_detect_unset_distributed_params(**arguments, initialization_timeout=1)


@pytest.mark.parametrize(
  ('nodes', 'first'),
  [('gpu7', 'gpu7'), ('gpu7,cpu1', 'gpu7'), ('gpu[007-011,20]', 'gpu007'), ('gpu[3,5]-ib,m2', 'gpu3')],
)
def test_slurm_with_one_process_per_node_uses_all_its_devices(monkeypatch, nodes, first):
  environ = slurm_step(SLURM_STEP_NODELIST=nodes)
  assert arguments_used_by_jax(monkeypatch, environ) == (f'{first}:61441', 2, 1, [])


@pytest.mark.parametrize(
  ('environ', 'devices'),
  [
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [2]),
    ({}, [2]),
    ({'CUDA_VISIBLE_DEVICES': '2'}, []),  # SLURM has assigned the GPUs
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_STEP_NUM_NODES': '8'}, []),  # one process per node
  ],
)
def test_slurm_with_several_processes_per_node(monkeypatch, environ, devices):
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  environ = slurm_step(**{'SLURM_NTASKS': '8', 'SLURM_PROCID': '6', 'SLURM_LOCALID': '2', **environ})
  assert arguments_used_by_jax(monkeypatch, environ) == ('gpu007:61441', 8, 6, devices)


def test_slurm_leaves_explicit_device_ids_to_jax():
  assert distributed.detect_cluster(environ=slurm_step(JAX_LOCAL_DEVICE_IDS='1'))['local_device_ids'] is None


def test_slurm_job_of_one_process():
  assert distributed.detect_cluster(environ=slurm_step(SLURM_NTASKS='1', SLURM_PROCID='0')) is None


@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    ({}, {}),  # TPU VM: jax reads the metadata server
    ({'TPU_SKIP_MDS_QUERY': '1'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}, {}),
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_SKIP_MDS_QUERY': 'true'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, {}),
  ],
)
def test_tpu(monkeypatch, environ, expected):
  monkeypatch.setattr(distributed, '_has_tpu', lambda: True)
  assert distributed.detect_cluster(environ=environ) == expected


def test_allgather_bytes_of_one_process():
  assert distributed.allgather_bytes(b'mine') == [b'mine']
