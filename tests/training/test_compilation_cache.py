"""Compilation cache of a workdir, shared by successive processes."""

import os
import subprocess
import sys

import pytest

RUN = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from mevit_jax.training.compilation_cache import enable_compilation_cache

jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.jit(jnp.sin)(1.0)  # JAX has found by now that it keeps none
jax.default_backend = lambda: sys.argv[2]
enable_compilation_cache(Path(sys.argv[1]))
counts = {'hits': 0, 'misses': 0}
jax.monitoring.register_event_listener(
  lambda event, **_: [counts.update({name: counts[name] + 1}) for name in counts if event.endswith('cache_' + name)]
)
assert jax.jit(lambda x: jnp.cos(x) * 2)(0.0) == 2
print(*counts.values())
"""


@pytest.fixture
def run(tmp_path):
  def start(platform, **variables):
    left = {name: value for name, value in os.environ.items() if 'CACHE' not in name}
    command = [sys.executable, '-c', RUN, str(tmp_path), platform]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**left, **variables})
    return [int(count) for count in done.stdout.split()], done.stderr

  return start


def test_the_second_process_compiles_nothing(run, tmp_path):
  (hits, misses), _ = run('tpu')
  assert hits == 0 < misses
  assert list(tmp_path.iterdir()) == [tmp_path / 'compiled']
  assert run('tpu')[0] == [misses, 0]
  for file in (tmp_path / 'compiled').glob('*-cache'):
    file.write_bytes(file.read_bytes()[:100])
  _, said = run('tpu')  # and its results are correct
  assert 'Error reading persistent compilation cache entry' in said


def test_cache_can_be_disabled_or_moved(run, tmp_path):
  assert run('cpu')[0] == [0, 0]
  assert not (tmp_path / 'compiled').exists()
  (_, misses), _ = run('tpu', JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'mine'))
  assert misses
  assert {path.name for path in tmp_path.iterdir()} == {'mine'}
