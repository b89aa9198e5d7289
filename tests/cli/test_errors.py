"""Invalid settings are refused before anything is written."""

import pytest

from mevit_jax.errors import UserError
from tests.helpers.workdirs import refused, without_labels

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'training.batch_size': 12}, r'training\.batch_size 12 is not divisible by the 8 devices'),
    (
      {'training.batch_size': 24, 'training.accumulate': 2},
      r'accumulate 2 is not divisible by 8 devices; use a multiple of 16',
    ),
    ({'augment.mixup': 0.8}, r'training\.batch_size 8 must be a multiple of 16 \(2 x training\.accumulate 1 x 8 dev'),
    (
      {'data.repeated_augmentation': 3},
      r'8 is not divisible by 6 \(2 videos x data\.repeated_augmentation 3',
    ),
    ({'mesh.data': 9}, r'mesh\.data is 9, but there are 8 devices'),
    ({'model.classes': 5}, r"model\.classes is 5, but the dataset 'moving_shapes' has 8"),
    ({'data.dataset': 'kinetics400'}, r"has no dataset 'kinetics400'; it has: moving_shapes; .*mevit prepare"),
    ({'data.data_dir': '/nowhere'}, r"/nowhere has no dataset 'moving_shapes'"),
    ({'data.train_split': 'test'}, r"no split 'test'; it has: train, validation"),
    ({'evaluation.split': 'test'}, r"no split 'test'; it has: train, validation"),
  ],
  ids=str,
)
def test_invalid_settings_create_no_workdir(tiny, tmp_path, changes, match):
  refused(tiny(**changes), tmp_path / 'run', match)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'model.block_size': 3}, r'block_size 3 is larger than the 2x2 grid'),
    (
      {'model.image_size': (20, 16), 'data.short_side': (20,)},
      r'image_size \(20, 16\) is not divisible by',
    ),
  ],
)
def test_invalid_model_is_refused_by_the_config(tiny, changes, match):
  with pytest.raises(UserError, match=match):
    tiny(**changes)


def test_training_on_a_split_without_labels_is_refused(tiny, tmp_path, monkeypatch):
  without_labels(monkeypatch)
  refused(tiny(), tmp_path / 'run', r'24 videos of moving_shapes/train, .* have no label: choose another')
  assert not (tmp_path / 'run').exists()


def test_a_file_is_not_a_workdir(tiny, tmp_path):
  (tmp_path / 'run').touch()
  refused(tiny(), tmp_path / 'run', 'run is a file: use another workdir')
