"""Devices: the mesh, where arrays live, and which rows are whose."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mevit_jax.errors import UserError
from mevit_jax.parallel.hosts import global_batch, host_rows
from mevit_jax.parallel.mesh import MeshConfig, make_mesh
from mevit_jax.parallel.placement import by_rows, place, placed

DEVICES = jax.device_count()


def test_all_devices_or_as_many_as_asked_for():
  assert DEVICES == 8  # as tests/conftest.py asks
  assert make_mesh(MeshConfig()).size == 8
  assert make_mesh(MeshConfig(data=2)).size == 2
  assert make_mesh(MeshConfig(), jax.devices()[:3]).size == 3


@pytest.mark.parametrize('count', [0, -2, 9])
def test_devices_that_are_not_there(count):
  with pytest.raises(UserError, match=f'mesh.data is {count}, but there are 8 devices'):
    make_mesh(MeshConfig(data=count))


def test_this_host_has_all_rows():
  for count in (1, 4, 8):
    assert host_rows(by_rows(make_mesh(MeshConfig(data=count))), 16) == slice(0, 16)


def test_a_batch_that_devices_do_not_divide():
  with pytest.raises(UserError, match=r'training\.batch_size 12 is not divisible by the 8 devices'):
    host_rows(by_rows(make_mesh(MeshConfig())), 12)


def test_rows_go_to_devices_in_order():
  batch = {'video': np.arange(48).reshape(16, 3), 'label': np.arange(16)}
  arrays = global_batch(batch, by_rows(make_mesh(MeshConfig())))
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, batch[name])
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    for i, shard in enumerate(shards):
      np.testing.assert_array_equal(shard.data, batch[name][2 * i : 2 * i + 2])


def test_the_first_rule_that_matches_holds():
  mesh = make_mesh(MeshConfig())
  tree = {'mlp': {'kernel': np.zeros((8, 2)), 'bias': np.zeros(8)}, 'head': np.zeros(3)}
  rules = (('mlp/kernel$', PartitionSpec('data')), ('mlp', PartitionSpec(None)), ('^head$', PartitionSpec()))
  specs = jax.tree.map(lambda sharding: sharding.spec, place(tree, mesh, rules))
  assert specs == {
    'mlp': {'kernel': PartitionSpec('data'), 'bias': PartitionSpec(None)},
    'head': PartitionSpec(),
  }
  with pytest.raises(ValueError, match='no placement rule matches head'):
    place(tree, mesh, rules[:2])


def test_everything_is_replicated_unless_told_otherwise():
  mesh = make_mesh(MeshConfig())
  shape = jax.ShapeDtypeStruct((3, 4), np.float32)
  target = placed({'a': [shape]}, mesh)['a'][0]
  assert (target.shape, target.dtype) == (shape.shape, shape.dtype)
  assert target.sharding.is_fully_replicated
  assert target.sharding.device_set == set(jax.devices())
