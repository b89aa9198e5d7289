"""Classifiers of other libraries that need no dataset: the same logits as the library's, and their own classes."""

import json

import jax
import numpy as np
import pytest

from mevit_jax.config.data import Normalization
from mevit_jax.config.model import usual_heads
from mevit_jax.errors import UserError
from mevit_jax.inference.predictor import Predictor
from mevit_jax.pretrained.export import export
from mevit_jax.pretrained.models import open_model
from tests.helpers.videos import make_video
from tests.pretrained.conftest import (
  CLASSES,
  DEPTH,
  SIDE,
  assert_close,
  config_of,
  logits_of,
  random_params,
  timesformer_config,
  to_torch,
)  # fmt: skip

NAMES = tuple(f'class {i}' for i in range(CLASSES))
HALF = Normalization()


@pytest.fixture
def image_classifier(tmp_path, rng):
  """A ViT as timm saves it, of a usual width, and its parameters."""
  config = config_of(2, 0, frames=1, width=192, heads=3)
  params = random_params(config, rng)
  export(tmp_path / 'vit', params, config, 'timm', class_names=NAMES, normalization=HALF)
  return tmp_path / 'vit', config, params


@pytest.fixture
def timesformer(tmp_path, rng):
  config = timesformer_config(frames=4)
  params = random_params(config, rng)
  export(tmp_path / 'tsf', params, config, 'hf_timesformer', class_names=NAMES, normalization=HALF)
  return tmp_path / 'tsf', config, params


def test_an_image_classifier_sees_frames_alone(image_classifier, rng):
  """The probabilities of a moving clip are the mean of those of its frames."""
  folder, config, params = image_classifier
  video = rng.integers(0, 256, (8, SIDE, SIDE, 3), np.uint8)
  prediction = Predictor(folder).predict(video, fps=30)
  logits = np.asarray(logits_of(config, params, (video[:, None] / 127.5 - 1).astype(np.float32)))  # t classes
  np.testing.assert_allclose(prediction.logits, logits, rtol=1e-4, atol=1e-4)
  expected = np.asarray(jax.nn.softmax(logits)).mean(0)
  np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-4, atol=1e-5)
  assert prediction.names == NAMES


def test_a_window_of_an_image_classifier_has_as_many_frames(image_classifier):
  predictor = Predictor(image_classifier[0])
  whole, *_ = predictor.timeline(make_video(40))
  assert {len(part.logits) for part in predictor.timeline(make_video(40), window=0.5)} == {len(whole.logits)} == {8}


def test_a_timesformer_is_itself(timesformer):
  folder, config, params = timesformer
  checkpoint = open_model(folder)
  jax.tree.map(np.testing.assert_allclose, checkpoint.params, params)
  model = checkpoint.config.model
  fields = ('space_blocks', 'motion_blocks', 'class_blocks', 'block_size', 'attention_order', 'class_token_in_motion')
  assert [getattr(model, name) for name in fields] == [getattr(config, name) for name in fields]
  assert (checkpoint.class_names, model.frames, checkpoint.config.clip.sampling) == (NAMES, 4, 'dense')


def test_the_classes_of_something_something_are_sampled_uniformly(timesformer):
  folder, *_ = timesformer
  config = json.loads((folder / 'config.json').read_text())
  config['id2label'] = {str(i): f'Pushing something {i}' for i in range(CLASSES)}
  (folder / 'config.json').write_text(json.dumps(config))
  assert open_model(folder).config.clip.sampling == 'uniform'


def test_models_that_cannot_be_used_alone(image_classifier, tmp_path, rng):
  folder, *_ = image_classifier
  with pytest.raises(UserError, match='has no checkpoints by step: leave out --checkpoint=best'):
    open_model(folder, 'best')
  with pytest.raises(UserError, match='has only raw parameters, no EMA ones'):
    open_model(folder, weights='ema')
  about = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({'architecture': about['architecture']}))
  with pytest.raises(UserError, match=f'does not name its {CLASSES} classes'):
    open_model(folder)
  (folder / 'config.json').write_text(json.dumps({**about, 'label_names': ['a']}))
  with pytest.raises(UserError, match=f'does not name its {CLASSES} classes'):
    open_model(folder)
  odd = config_of(2, 0, frames=1)
  export(tmp_path / 'odd', random_params(odd, rng), odd, 'timm', class_names=NAMES, normalization=HALF)
  (tmp_path / 'odd' / 'config.json').write_text(json.dumps({**about, 'model_args': None, 'architecture': 'my_vit'}))
  with pytest.raises(UserError, match='does not state its number of attention heads'):
    open_model(tmp_path / 'odd')


def test_usual_heads():
  """Those of the published ViTs; heads are 64 wide but for H's 80."""
  assert [usual_heads(width) for width in (192, 384, 768, 1024, 1280, 32)] == [3, 6, 12, 16, 16, None]


def named(labels):
  return {'id2label': dict(enumerate(labels)), 'label2id': {label: i for i, label in enumerate(labels)}}


def test_logits_of_the_library(hf_vit, hf_timesformer, tmp_path, rng):
  """Hugging Face's own forward pass, on a moving clip; an image classifier frame by frame."""
  video = rng.normal(0, 1, (2, 8, SIDE, SIDE, 3)).astype(np.float32)
  model = hf_timesformer(**named(NAMES))
  model.save_pretrained(tmp_path / 'tsf')
  opened = open_model(tmp_path / 'tsf')
  assert_close(logits_of(opened.config.model, opened.params, video), model(to_torch(video)).logits)
  model = hf_vit(**named(NAMES))
  model.save_pretrained(tmp_path / 'vit')
  opened = open_model(tmp_path / 'vit')
  frames = video.reshape(-1, SIDE, SIDE, 3)
  assert_close(logits_of(opened.config.model, opened.params, frames[:, None]), model(to_torch(frames)).logits)
  assert opened.config.model.space_blocks == DEPTH
