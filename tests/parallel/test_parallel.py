"""Devices: the mesh, where arrays live, and which rows are whose."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mevit_jax.config.mesh import MeshConfig
from mevit_jax.errors import UserError
from mevit_jax.parallel.hosts import global_batch, process_batch_slice
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import REPLICATED, batch_sharding, place, placed

DEVICES = jax.device_count()


def test_all_devices_or_as_many_as_asked_for():
  assert DEVICES == 8  # as tests/conftest.py asks
  assert make_mesh(MeshConfig()).size == 8
  assert make_mesh(MeshConfig(data=2)).size == 2
  assert make_mesh(MeshConfig(), jax.devices()[:3]).size == 3


def test_data_takes_what_the_other_axes_leave():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
  assert dict(mesh.shape) == {'slice': 1, 'data': 2, 'fsdp': 2, 'tensor': 2}
  assert [device.id for device in mesh.devices.ravel()] == list(range(8))
  assert make_mesh(MeshConfig(data=1, fsdp=2)).size == 2


@pytest.mark.parametrize('count', [0, -2, 9])
def test_devices_that_are_not_there(count):
  with pytest.raises(UserError, match=f'mesh.data is {count}, but there are 8 devices'):
    make_mesh(MeshConfig(data=count))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'fsdp': 0}, 'mesh.fsdp must be at least 1, not 0'),
    ({'tensor': -1}, 'mesh.tensor must be at least 1, not -1'),
    ({'fsdp': 3}, 'mesh.slice 1 x mesh.fsdp 3 x mesh.tensor 1 = 3 does not divide the 8 devices'),
    ({'fsdp': 16}, 'mesh.fsdp 16 .* does not divide the 8 devices'),
    ({'data': 3, 'fsdp': 4}, r'mesh.data is 3 \(x 4 along its other axes\), but there are 8 devices'),
  ],
)
def test_a_mesh_that_the_devices_do_not_make(fields, message):
  with pytest.raises(UserError, match=message):
    make_mesh(MeshConfig(**fields))


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device that is not there."""

  id: int
  process_index: int
  slice_index: int
  platform: str = 'tpu'


def test_slices_are_outermost_and_hosts_stand_together():
  chips = [Chip(id, process_index=id % 4, slice_index=id % 2) for id in range(8)]
  mesh = make_mesh(MeshConfig(slice=2, fsdp=2, tensor=2), chips)
  assert [(chip.slice_index, chip.process_index) for chip in mesh.devices.ravel()] == [
    (0, 0), (0, 0), (0, 2), (0, 2), (1, 1), (1, 1), (1, 3), (1, 3),
  ]  # fmt: skip
  for count in (1, 4):
    with pytest.raises(UserError, match=f'mesh.slice is {count}, but the 8 devices are of 2 slices'):
      make_mesh(MeshConfig(slice=count), chips)


def test_this_host_has_all_rows():
  for count in (1, 4, 8):
    assert process_batch_slice(batch_sharding(make_mesh(MeshConfig(data=count))), 16) == slice(0, 16)
  assert process_batch_slice(batch_sharding(make_mesh(MeshConfig(fsdp=2, tensor=2))), 4) == slice(0, 4)


def test_a_batch_that_devices_do_not_divide():
  with pytest.raises(UserError, match=r'training\.batch_size 12 is not divisible by the 8 devices'):
    process_batch_slice(batch_sharding(make_mesh(MeshConfig())), 12)
  with pytest.raises(UserError, match='12 is not divisible by the 8 devices'):
    process_batch_slice(batch_sharding(make_mesh(MeshConfig(fsdp=4))), 12)
  with pytest.raises(UserError, match='6 is not divisible by the 4 groups of 2 devices'):
    process_batch_slice(batch_sharding(make_mesh(MeshConfig(tensor=2))), 6)


def test_rows_of_a_host_that_do_not_stand_together(monkeypatch):
  """As they would if its devices were the first and the last of a mesh."""
  rows = batch_sharding(make_mesh(MeshConfig()))
  both = {device: (slice(i, i + 2),) for device, i in zip(jax.devices(), (0, 14), strict=False)}
  monkeypatch.setattr(type(rows), 'addressable_devices_indices_map', lambda self, shape: both)
  with pytest.raises(UserError, match=r'this host has rows \[\(0, 2\), \(14, 16\)\] of a batch'):
    process_batch_slice(rows, 16)


def test_rows_go_to_devices_in_order():
  batch = {'video': np.arange(48).reshape(16, 3), 'label': np.arange(16)}
  arrays = global_batch(batch, batch_sharding(make_mesh(MeshConfig())))
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


def test_a_weight_that_the_mesh_does_not_divide():
  mesh = make_mesh(MeshConfig(fsdp=8))
  with pytest.raises(UserError, match=r'mesh.fsdp 8 does not divide 12, a side of head/kernel \(12, 5\)'):
    place({'head': {'kernel': np.zeros((12, 5))}}, mesh)
  with pytest.raises(UserError, match=r'mesh.tensor 8 does not divide 12, a side of mlp/up/kernel \(3, 8, 12\)'):
    place({'mlp': {'up': {'kernel': np.zeros((3, 8, 12))}}}, make_mesh(MeshConfig(tensor=8)))


def test_what_no_rule_names_is_whole_everywhere():
  mesh = make_mesh(MeshConfig(fsdp=2))
  shape = jax.ShapeDtypeStruct((3, 4), np.float32)
  assert place({'a': shape}, mesh)['a'] == place({'a': shape}, mesh, REPLICATED)['a']
  target = placed({'a': [shape]}, mesh)['a'][0]
  assert (target.shape, target.dtype) == (shape.shape, shape.dtype)
  assert target.sharding.is_fully_replicated
  assert target.sharding.device_set == set(jax.devices())
