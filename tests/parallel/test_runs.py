"""Whole runs over meshes: begun on one, gone on with on another, evaluated on a third."""

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


def test_a_run_goes_on_over_another_mesh(tiny, tmp_path):
  def recipe(**mesh):
    return dataclasses.replace(tiny(), mesh=MeshConfig(**mesh))

  train.train(recipe(data=1), str(tmp_path / 'one'))
  train.train(recipe(fsdp=4, tensor=2), str(tmp_path / 'many'))
  shutil.rmtree(tmp_path / 'many/checkpoints/6')  # as if it had been killed after step 5
  train.train(recipe(data=2, fsdp=2), str(tmp_path / 'many'))
  expected, found = losses(tmp_path / 'one'), losses(tmp_path / 'many')
  assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
  one = evaluate.evaluate(recipe(data=1), str(tmp_path / 'one'))
  many = evaluate.evaluate(recipe(slice=2, fsdp=4), str(tmp_path / 'many'))
  assert (many['videos'], many['top1_correct']) == (11, one['top1_correct'])
