"""Launch scripts, with stubs for cluster commands, and the JobSet files for GKE."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mevit_jax.config.flags import default_config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
# Options of gcloud 528 by command; all commands have --project, --quiet and --format.
GCLOUD = {
  'queued-resources create': {'zone', 'node-id', 'accelerator-type', 'runtime-version', 'spot'},
  'queued-resources describe': {'zone'},
  'queued-resources delete': {'zone', 'force'},
  'tpu-vm ssh': {'zone', 'worker', 'command'},
  'tpu-vm scp': {'zone', 'worker'},
}


def bash(*arguments, path='/usr/bin'):
  """Runs a script of launch/ with a folder prepended to PATH."""
  environment = {**os.environ, 'PATH': f'{path}:{os.environ["PATH"]}'}
  return subprocess.run(['bash', *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def stub(folder, name, script):
  """Writes an executable script into a folder."""
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(f'#!/usr/bin/env bash\n{script}\n')
  (folder / name).chmod(0o755)


def wait_until(condition):
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda script: script.name)
def test_scripts_stop_at_the_first_error(script):
  if script.name != 'environment.sh':  # sourced by the other scripts
    assert '\nset -euo pipefail\n' in script.read_text()
  assert subprocess.run(['bash', '-n', script]).returncode == 0


def test_shellcheck():
  shellcheck = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
  if shellcheck is None:
    pytest.skip('shellcheck is not installed: requirements-test.txt brings it')
  done = subprocess.run([shellcheck, '-x', *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', ['gpus.sh', 'slurm.sh', 'tpu_pod.sh'])
def test_help_shows_usage_and_documentation_page(name):
  done = bash(f'launch/{name}', '--help')
  assert (done.returncode, done.stderr) == (0, '')
  assert f'launch/{name}' in done.stdout
  page = re.search(r'docs/\S+\.md', done.stdout)[0]
  assert f'launch/{name}' in (ROOT / page).read_text()
  assert '#' not in done.stdout


def test_gpu_script():
  done = bash('launch/gpus.sh', '--dry_run', '--config=configs/k400.py', '--workdir=a b')
  *_, command = done.stdout.splitlines()
  assert shlex.split(command) == ['.venv-gpu/bin/python', 'main.py', '--config=configs/k400.py', '--workdir=a b']


@pytest.mark.parametrize('devices', ['gpu', 'tpu'])
def test_requirements_of_accelerators_pin_the_same_jax(devices):
  pinned = re.search(r'^jax==(\S+)$', (ROOT / 'requirements.txt').read_text(), re.M)[1]
  assert re.search(rf'^jax\[\w+\]=={re.escape(pinned)}$', (ROOT / f'requirements-{devices}.txt').read_text(), re.M)


# SLURM, with stubs of its commands.


def test_slurm_runs_one_process_per_node():
  done = bash('launch/slurm.sh', '--dry_run', '--workdir=w')
  assert done.stdout.splitlines()[-1] == 'srun --kill-on-bad-exit=1 --label .venv-gpu/bin/python main.py --workdir=w '
  options = dict(re.findall(r'^#SBATCH --([\w-]+)=?(.*)$', (ROOT / 'launch/slurm.sh').read_text(), re.M))
  assert options['ntasks-per-node'] == '1'
  assert options['signal'].startswith('B:USR1@')  # the signal that the script traps
  outside = bash('launch/slurm.sh', '--workdir=w')
  assert outside.returncode == 1
  assert 'sbatch' in outside.stdout


@pytest.mark.parametrize(('status', 'requeued'), [(143, True), (0, False)], ids=['incomplete', 'complete'])
def test_slurm_saves_and_requeues_at_the_time_limit(tmp_path, status, requeued):
  stubs, job = tmp_path / 'bin', tmp_path / 'job'
  (job / 'launch').mkdir(parents=True)
  (job / 'launch/environment.sh').write_text('environment() { :; }\nrun() { "$@"; }\n')
  stub(stubs, 'srun', f'trap "exit {status}" TERM\necho $$ > srun.pid\nwhile :; do sleep 0.1; done')
  stub(stubs, 'scancel', 'echo "$@" >> scancel.log; kill -TERM $(cat srun.pid)')
  stub(stubs, 'scontrol', 'echo "$@" >> scontrol.log')
  environment = {
    **os.environ, 'PATH': f'{stubs}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7', 'SLURM_SUBMIT_DIR': str(job),
  }  # fmt: skip
  with subprocess.Popen(['bash', ROOT / 'launch/slurm.sh', '--workdir=w'], env=environment) as running:
    wait_until((job / 'srun.pid').exists)
    time.sleep(0.2)  # until the file is written and bash waits
    running.send_signal(10)  # USR1, as SLURM does
    assert running.wait(30) == status
  assert (job / 'scancel.log').read_text() == '--signal=TERM 7\n'
  assert (job / 'scontrol.log').exists() == requeued


# TPU pods, with a stub of gcloud that runs the remote commands on this machine.


@pytest.mark.parametrize('command', ['create', 'install', 'run', 'follow', 'stop', 'delete'])
def test_tpu_pod_uses_valid_gcloud_options(command, tmp_path):
  options = {'create': ['--type=v6e-64', '--spot'], 'install': ['--bucket=b'], 'run': ['--', '--config=c']}
  stub(tmp_path / 'bin', 'gcloud', f"printf '%s\\0' \"$@\" '' >> {tmp_path}/calls; echo ACTIVE")
  stub(tmp_path / 'bin', 'git', ':')
  arguments = ['pod', '--zone=z', '--project=p', *options.get(command, [])]
  assert bash('launch/tpu_pod.sh', command, *arguments, path=tmp_path / 'bin').returncode == 0
  calls = [call.split('\0') for call in (tmp_path / 'calls').read_text().split('\0\0')[:-1]]
  for compute, tpus, kind, action, *rest in calls:
    assert (compute, tpus) == ('compute', 'tpus')
    given = dict(option[2:].partition('=')[::2] for option in rest if option.startswith('--'))
    assert given.keys() <= GCLOUD[f'{kind} {action}'] | {'project', 'quiet', 'format'}
    assert (given['zone'], given['project']) == ('z', 'p')
  dry = bash('launch/tpu_pod.sh', command, arguments[0], '--dry_run', *arguments[1:])
  assert dry.returncode == 0
  assert dry.stdout.count('gcloud compute tpus') == len(calls) - (command == 'create')  # which then polls the state


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['create'], 'give a NAME'),
    (['create', 'pod'], 'give --zone=ZONE'),
    (['create', 'pod', '--zone=z', '--type=v9-8'], "not 'v9-8'"),
    (['create', 'pod', '--zone=z', '--tpye=v6e-8'], 'unknown option --tpye=v6e-8'),
    (['run', 'pod', '--zone=z'], 'give the flags of main.py after --'),
    (['destroy', 'pod', '--zone=z'], 'unknown command destroy'),
  ],
)
def test_tpu_pod_errors_are_one_line(arguments, message):
  done = bash('launch/tpu_pod.sh', *arguments)
  assert done.returncode == 1
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_tpu_pod_runs_once_and_stops(tmp_path):
  home, stubs = tmp_path / 'home', tmp_path / 'bin'
  python = home / 'mevit_jax/.venv/bin'
  python.mkdir(parents=True)
  stub(python, 'python', 'printf "<%s>" "$@"; echo; trap "echo saved; exit 143" TERM; while :; do sleep 0.1; done')
  stub(stubs, 'gcloud', f'cd {home} && for o; do [[ $o != --command=* ]] || exec bash -c "${{o#--command=}}"; done')
  pod = ['pod', '--zone=z']
  flags = ['--config=c', '--workdir=~/b/it is', '--config.optimizer.freeze=^(?!head)']
  log = home / 'mevit_jax/run.log'
  try:
    done = bash('launch/tpu_pod.sh', 'run', *pod, '--', *flags, path=stubs)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: log.read_text())
    assert log.read_text() == '<-u><main.py>' + ''.join(f'<{flag}>' for flag in flags) + '\n'
    second = bash('launch/tpu_pod.sh', 'run', *pod, '--', *flags, path=stubs)
    assert second.returncode == 1
    assert 'a run is in progress' in second.stderr
  finally:
    bash('launch/tpu_pod.sh', 'stop', *pod, path=stubs)
  wait_until(lambda: log.read_text().endswith('saved\n'))


# GKE.

JOBSETS = ['gke_jobset.yaml', 'gke_jobset_gpu.yaml']


def jobset(name):
  return yaml.safe_load((ROOT / 'launch' / name).read_text())


def check(value, schema, path=''):
  """Checks fields and types against a schema: {field: schema}, [schema of the items], or a type."""
  if isinstance(schema, dict):
    assert isinstance(value, dict), path
    unknown = value.keys() - schema.keys()
    assert not unknown, f'{path}: {unknown}'
    for name, part in value.items():
      check(part, schema[name], f'{path}.{name}')
  elif isinstance(schema, list):
    for i, part in enumerate(value):
      check(part, schema[0], f'{path}[{i}]')
  else:
    assert isinstance(value, schema), path


# Fields of the custom resource definition jobset.x-k8s.io/v1alpha2; the fields of a Job are Kubernetes' own.
JOBSET = {
  'apiVersion': str,
  'kind': str,
  'metadata': {'name': str, 'namespace': str, 'labels': dict, 'annotations': dict},
  'spec': {
    'coordinator': {'jobIndex': int, 'podIndex': int, 'replicatedJob': str},
    'failurePolicy': {'maxRestarts': int, 'restartStrategy': str, 'rules': list},
    'managedBy': str,
    'network': {'enableDNSHostnames': bool, 'publishNotReadyAddresses': bool, 'subdomain': str},
    'replicatedJobs': [{'dependsOn': list, 'groupName': str, 'name': str, 'replicas': int, 'template': dict}],
    'startupPolicy': dict,
    'successPolicy': dict,
    'suspend': bool,
    'ttlSecondsAfterFinished': int,
  },
}


@pytest.mark.parametrize('name', JOBSETS)
def test_jobset_matches_its_resource_definition(name):
  content = jobset(name)
  check(content, JOBSET)
  assert (content['apiVersion'], content['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')


@pytest.mark.parametrize('name', JOBSETS)
def test_jobs_match_the_kubernetes_schema(name):
  validate = pytest.importorskip('kubernetes_validate')
  for job in jobset(name)['spec']['replicatedJobs']:
    manifest = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}, **job['template']}
    validate.validate(manifest, '1.32', strict=True)
    del manifest['spec']['template']['spec']['containers'][0]['name']
    with pytest.raises(validate.ValidationError):
      validate.validate(manifest, '1.32', strict=True)


@pytest.mark.parametrize('name', JOBSETS)
def test_jobset_is_consistent(name):
  content = jobset(name)
  (job,) = content['spec']['replicatedJobs']
  spec = job['template']['spec']
  pod = spec['template']['spec']
  (container,) = pod['containers']
  assert spec['parallelism'] == spec['completions']
  assert (spec['completionMode'], spec['backoffLimit'], pod['restartPolicy']) == ('Indexed', 0, 'Never')
  assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in pod['volumes']}
  environment = {variable['name']: variable.get('value') for variable in container.get('env', [])}
  if name == 'gke_jobset.yaml':  # GKE sets the variables for jax.distributed
    sides = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
    assert math.prod(map(int, sides)) == spec['completions'] * container['resources']['limits']['google.com/tpu']
    assert not environment
  else:
    names = content['metadata']['name'], job['name']
    assert environment['JAX_COORDINATOR_ADDRESS'] == f'{names[0]}-{names[1]}-0-0.{names[0]}:1234'
    assert environment['JAX_NUM_PROCESSES'] == str(spec['completions'])
    assert environment.keys() == {'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'}
    assert content['spec']['network']['enableDNSHostnames']


@pytest.mark.parametrize('name', JOBSETS)
def test_jobset_uses_valid_flags_of_main(name):
  (job,) = jobset(name)['spec']['replicatedJobs']
  (container,) = job['template']['spec']['template']['spec']['containers']
  config = default_config()
  for argument in container['args']:
    flag, _, value = argument.removeprefix('--').partition('=')
    if flag == 'config':
      assert (ROOT / value).exists()
    elif flag.startswith('config.'):
      _, section, field = flag.split('.')
      assert field in config[section]
    else:
      assert flag == 'workdir'
