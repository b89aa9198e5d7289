"""`resolve` is the only function that changes a config; it reports every change and refuses contradictions."""

import dataclasses

import pytest

from mevit_jax.config.data import Normalization
from mevit_jax.config.experiment import from_dict, to_dict
from mevit_jax.config.resolve import Dataset, Source, describe, resolve
from mevit_jax.errors import UserError

DATASET = Dataset('mine', ('a', 'b'))


def flat(values, path=''):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from flat(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', value


def assert_reported(before, after, changes):
  """Checks that the reported changes are exactly the differences."""
  old, new = dict(flat(to_dict(before))), dict(flat(to_dict(after)))
  assert {c.field: (c.before, c.after) for c in changes} == {
    name: (old[name], new[name]) for name in old if old[name] != new[name]
  }
  assert all(change.reason for change in changes)


def test_nothing_to_resolve():
  config = from_dict({'evaluation': {'batch_size': 8}})
  assert resolve(config, devices=4) == (config, [])


def test_classes_come_from_the_dataset():
  config = from_dict({'data': {'short_side': (256, 320), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}})
  resolved, changes = resolve(config, DATASET)
  assert resolved.model.classes == 2
  assert_reported(config, resolved, changes)
  assert describe(changes) == 'config.model.classes: 0 -> 2 (classes of the dataset mine)'
  with pytest.raises(UserError, match=r"model.classes is 3, but the dataset 'mine' has 2"):
    resolve(from_dict({'model': {'classes': 3}}), DATASET)


@pytest.mark.parametrize(
  ('size', 'expected'), [((224, 224), (256, 320)), ((64, 112), (73, 91)), ((112, 112), (128, 160))]
)
def test_the_short_side_follows_the_image_size(size, expected):
  config = from_dict({'model': {'image_size': size}})
  resolved, changes = resolve(config, DATASET)
  assert resolved.data.short_side == expected
  assert config.clip == resolved.clip  # also before it is resolved
  assert_reported(config, resolved, changes)
  kept, _ = resolve(from_dict({'model': {'image_size': size}, 'data': {'short_side': 300}}), DATASET)
  assert kept.data.short_side == (300,)


def test_from_scratch_the_normalization_is_that_of_the_dataset():
  pixels = Normalization((0.4, 0.3, 0.2), (0.2, 0.1, 0.3))
  config = from_dict({})
  resolved, changes = resolve(config, DATASET._replace(normalization=pixels))
  assert resolved.data.normalization == pixels
  assert_reported(config, resolved, changes)
  resolved, changes = resolve(config, DATASET)
  assert resolved.data.mean == resolved.data.std == (0.5, 0.5, 0.5)
  assert 'the dataset mine does not state its own; prepare it again, with --overwrite' in describe(changes)
  chosen = from_dict({'data': {'mean': (0.1,) * 3, 'std': (0.9,) * 3}})
  assert resolve(chosen, DATASET._replace(normalization=pixels))[0].data.normalization == chosen.data.normalization


@pytest.mark.parametrize('stated', [Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), None])
def test_pretrained_weights_keep_their_normalization(stated):
  pixels = Normalization((0.4, 0.3, 0.2), (0.2, 0.1, 0.3))
  config = from_dict({'init_from': 'vit.npz'})
  resolved, _ = resolve(
    config, DATASET._replace(normalization=pixels), Source('vit.npz', {'layer_norm_eps': 1e-12}, stated)
  )
  assert resolved.data.normalization == (stated or Normalization())


def test_repeated_clips_must_differ():
  equal = {'model': {'image_size': 64}, 'data': {'repeated_augmentation': 2, 'short_side': 64}}
  with pytest.raises(UserError, match=r'data.repeated_augmentation 2 would repeat the same clip: .*set augment.flip'):
    resolve(from_dict(equal), DATASET)
  for group, field in (('augment', {'flip': True}), ('augment', {'mixup': 0.8}), ('data', {'short_side': (64, 72)})):
    resolve(from_dict({**equal, group: {**equal.get(group, {}), **field}}), DATASET)
  resolve(from_dict(equal), DATASET, evaluate=True)


@pytest.mark.parametrize(('size', 'devices', 'wanted'), [(32, 8, 32), (7, 8, 8), (33, 8, 40), (1, 1, 1)])
def test_evaluation_batches_are_divisible_by_the_devices(size, devices, wanted):
  config = from_dict({'evaluation': {'batch_size': size}})
  resolved, changes = resolve(config, devices=devices)
  assert resolved.evaluation.batch_size == wanted
  assert_reported(config, resolved, changes)


def test_training_evaluates_the_last_checkpoint():
  config = from_dict({'evaluation': {'checkpoint': 'best'}})
  resolved, changes = resolve(config)
  assert resolved.evaluation.checkpoint == 'last'
  assert_reported(config, resolved, changes)
  assert resolve(config, evaluate=True) == (config, [])


def test_weights_set_epsilon_and_normalization():
  config = from_dict({'init_from': 'vit.npz'})
  source = Source('vit.npz', {'layer_norm_eps': 1e-12}, Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
  resolved, changes = resolve(config, source=source)
  assert (resolved.model.layer_norm_eps, resolved.data.normalization) == (1e-12, source.normalization)
  assert_reported(config, resolved, changes)
  kept, _ = resolve(config, source=source._replace(normalization=None))
  assert kept.data == config.data


def test_resumed_run_keeps_its_init_from():
  trained = from_dict({'init_from': 'vit.npz', 'init_head': 'fresh', 'model': {'layer_norm_eps': 1e-12}})
  config = from_dict({})
  source = Source('runs/a', {'layer_norm_eps': 1e-12}, trained.data.normalization, trained)
  resolved, changes = resolve(config, source=source)
  assert (resolved.init_from, resolved.init_head) == ('vit.npz', 'fresh')
  assert_reported(config, resolved, changes)


def test_evaluation_uses_the_model_of_the_checkpoint_except_for_its_dtype():
  trained = from_dict(
    {'model': {'classes': 7, 'drop_path': 0.1, 'dtype': 'bfloat16'}, 'data': {'mean': (0.1, 0.2, 0.3)}}
  )
  config = from_dict({'model': {'dtype': 'float32'}})
  source = Source('runs/a', {'layer_norm_eps': trained.model.layer_norm_eps}, trained.data.normalization, trained)
  resolved, changes = resolve(config, source=source, evaluate=True)
  assert resolved.model == dataclasses.replace(trained.model, dtype='float32')
  assert resolved.data.normalization == trained.data.normalization
  assert_reported(config, resolved, changes)
  with pytest.raises(UserError, match=r'runs/a has a different model \(saved -> requested\): model.block_size: 2 -> 7'):
    resolve(from_dict({'model': {'block_size': 7}}), source=source, evaluate=True)
