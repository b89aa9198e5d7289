"""The explain command, and attention maps in a report."""

import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mevit_jax import experiment as runs
from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.cli import explain
from mevit_jax.config.model import MEViTConfig
from mevit_jax.datasets.builders import moving_shapes
from mevit_jax.errors import UserError
from mevit_jax.evaluate import evaluate
from mevit_jax.evaluation.attention_maps import map_kinds
from mevit_jax.report import attention
from mevit_jax.video.decode import decode, inspect
from tests.helpers.workdirs import of_format_1, with_checkpoint

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture(scope='module')
def workdir(tiny, compile_once, tmp_path_factory):
  """Workdir of an untrained model with three stages, on 2 frames of 2 x 2 patches."""
  del compile_once
  folder = tmp_path_factory.mktemp('explain')
  run = runs.prepare_run(tiny(**{'model.class_blocks': 1}), folder)
  with_checkpoint(run, runs.initial_state(run))
  return folder


@pytest.fixture(scope='module')
def video(tmp_path_factory):
  """Video of a shape that moves right, in 12 frames of 24 x 24 pixels."""
  path = tmp_path_factory.mktemp('video') / 'a $right$ video.mp4'
  params = moving_shapes.draw('horizontal', np.random.default_rng(0))
  path.write_bytes(moving_shapes.encode(moving_shapes.render('moves_right', params, frames=12, size=24)))
  return path


def test_figure_and_overlay_show_the_attention_of_the_model(workdir, video, tmp_path):
  figure, overlay = tmp_path / 'attention.png', tmp_path / 'attention.mp4'
  explanation = attention.explain(video, load_checkpoint(workdir), query=(1, 0, 1))
  assert explanation.query == (1, 0, 1)
  explanation.write_figure(figure)
  explanation.write_overlay(overlay)
  heats = explanation.heat_maps
  space, motion, classify, rollout = heats
  assert [heat.query for heat in heats] == [(1, 0, 1)] * 2 + [None] * 2
  for heat, total in ((space, 1), (motion, 1), (classify, 1), (rollout, 0.5)):  # the class token keeps half
    np.testing.assert_allclose(heat.weights.sum(), total, atol=1e-5)
    assert heat.weights.shape == (2, 2, 2)
  assert not space.weights[0].any()  # another frame
  assert motion.weights.all()  # M is the size of the grid
  with Image.open(figure) as image:
    assert len(np.unique(np.asarray(image))) > 20
  data = overlay.read_bytes()
  # The two frames are 2 / 30 s apart: they span three frames of 16 x 16 pixels, seven times as large.
  info = inspect(data)
  assert (info.num_frames, info.height, info.width) == (3, 112, 112)
  first, last = decode(data, np.asarray([0, 2 / 30]))
  assert np.abs(first.astype(int) - last).mean() > 1


def test_the_shown_patch_has_the_largest_rollout(workdir, video):
  *_, motion, _, rollout = attention.explain(video, load_checkpoint(workdir)).heat_maps
  assert motion.query == np.unravel_index(rollout.weights.argmax(), rollout.weights.shape)


def test_a_report_shows_attention_maps(workdir, tiny):
  fields = {'model.class_blocks': 1, 'evaluation.batch_size': 16}
  protocol = evaluate(tiny(**fields, **{'evaluation.attention_maps': 3}), str(workdir))['protocol']
  assert 'attention_maps' not in protocol  # affects the report only
  page = (workdir / 'evaluation' / protocol['name'] / 'report.html').read_text()
  assert page.partition('Attention maps')[2].count('data:image/png') == 3


@pytest.mark.parametrize(
  ('stages', 'block', 'kinds'),
  [
    ((4, 7, 1), -1, [('space', 10), ('motion', 10), ('class', 11), ('rollout', 11)]),
    ((4, 7, 1), 8, [('space', 8), ('motion', 8), ('rollout', 11)]),
    ((4, 7, 1), -9, [('space', 3), ('rollout', 11)]),
    ((0, 12, 0), 5, [('space', 5), ('motion', 5), ('class', 5), ('rollout', 11)]),
    ((0, 0, 2), 0, [('class', 0), ('rollout', 1)]),
  ],
)
def test_each_map_is_of_the_last_block_with_that_attention(stages, block, kinds):
  names = ('space_blocks', 'motion_blocks', 'class_blocks')
  assert map_kinds(MEViTConfig(**dict(zip(names, stages, strict=True))), block) == kinds


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'block': 3}, r'--block must be 0 to 2, as the model has 3 blocks, not 3'),
    (
      {'query': (2, 0, 0)},
      r'--query=2,0,0 is out of range: the model has 2 frames of 2 x 2 patches, so the last patch is 1,1,1',
    ),
    ({'video': 'nothing.mp4'}, r'nothing\.mp4: no such file'),
    ({'video': __file__}, r'test_explain\.py: not a video'),
    ({'checkpoint': '99'}, r'no checkpoint 99'),
    ({'workdir': 'nowhere'}, r'nowhere is not a workdir: it has no config\.json'),
  ],
)
def test_invalid_arguments_are_one_line_errors(workdir, video, options, words):
  def run(*, video=video, workdir=workdir, checkpoint='last', **query):
    attention.explain(Path(video), load_checkpoint(workdir, checkpoint), **query)

  with pytest.raises(UserError, match=words) as error:
    run(**options)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'options', 'words'),
  [
    ([], {}, 'give one video file, not 0'),
    (['video.mp4'], {}, 'nothing to write'),
    (['video.mp4'], {'figure': 'gone/attention.png'}, r'--figure=gone/attention\.png: the folder gone does not exist'),
    (
      ['video.mp4'],
      {'overlay': 'gone/attention.mp4'},
      r'attention\.mp4: the folder gone does not exist',
    ),
    (['video.mp4'], {'figure': '.'}, r'--figure=\. is a folder'),
    (['video.mp4'], {'figure': 'attention.jpg'}, r'--figure=attention\.jpg: the file name must end with \.png'),
    (['video.mp4'], {'figure': 'attention.png', 'query': '1,2'}, '--query must be FRAME,ROW,COLUMN of a patch'),
  ],
)
def test_arguments_are_checked_before_the_workdir(monkeypatch, arguments, options, words):
  asked = {'figure': None, 'overlay': None, 'query': '', 'block': -1, 'checkpoint': 'last', 'model': 'nowhere'}
  monkeypatch.setattr(explain.flags, 'FLAGS', types.SimpleNamespace(**{**asked, **options}))
  with pytest.raises(UserError, match=words):
    explain.main(['explain', *arguments])


def test_the_input_video_is_not_overwritten(monkeypatch, video):
  asked = {'figure': None, 'overlay': str(video), 'model': 'nowhere'}
  monkeypatch.setattr(explain.flags, 'FLAGS', types.SimpleNamespace(**asked))
  with pytest.raises(UserError, match='is one of the input videos: choose another name'):
    explain.main(['explain', str(video)])


def test_a_workdir_of_an_older_version_is_refused(workdir, video, tmp_path):
  with pytest.raises(UserError, match='has format 1; this version'):
    attention.explain(video, load_checkpoint(of_format_1(workdir, tmp_path / 'older')))
