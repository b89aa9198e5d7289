"""Runs that start on one mesh, resume on another, and are evaluated on a third."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mevit_jax import evaluate, train
from mevit_jax.config.mesh import MeshConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compile_once')]


def losses(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {line['step']: line['train/loss'] for line in lines if 'train/loss' in line}


def test_run_resumes_on_another_mesh(tiny, tmp_path):
  def config(**mesh):
    return dataclasses.replace(tiny(), mesh=MeshConfig(**mesh))

  train.train(config(data=1), str(tmp_path / 'one'))
  train.train(config(fsdp=4, tensor=2), str(tmp_path / 'many'))
  shutil.rmtree(tmp_path / 'many/checkpoints/6')  # like a run killed after step 5
  train.train(config(data=2, fsdp=2), str(tmp_path / 'many'))
  expected, actual = losses(tmp_path / 'one'), losses(tmp_path / 'many')
  assert list(actual) == list(expected) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-5)
  one = evaluate.evaluate(config(data=1), str(tmp_path / 'one'))
  many = evaluate.evaluate(config(slice=2, fsdp=4), str(tmp_path / 'many'))
  assert (many['videos'], many['top1_correct']) == (11, one['top1_correct'])
