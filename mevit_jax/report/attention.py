"""Attention maps of a checkpoint: for one video (`mevit explain`), and as a section of an evaluation's report."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from mevit_jax.checkpoint.reader import Checkpoint
from mevit_jax.config.data import ClipConfig
from mevit_jax.config.experiment import Config
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.evaluation.attention_maps import Patch, make_attention_maps, map_kinds
from mevit_jax.files import atomic_path
from mevit_jax.models.functional import Params, build_model
from mevit_jax.report.examples import Example
from mevit_jax.report.heatmaps import HeatMap, draw_heat_maps, heat_maps, overlay_weights, scale_to_max
from mevit_jax.report.html import Section
from mevit_jax.video.clips import crop_resize, view_boxes, view_times
from mevit_jax.video.container import VideoError
from mevit_jax.video.reader import FileReader, read_views, spans
from mevit_jax.video.write import write_frames

_MAX_FPS = 60


@dataclasses.dataclass(frozen=True)
class CenterClip:
  """Center clip and center crop of a video, as in an evaluation of one view.

  Attributes:
    path: video file.
    reader: reader of the video.
    config: frames and crop of the clip.
    times: timestamps of the frames in seconds, `t`.
    frames: `t h w 3`, uint8.
  """

  path: Path
  reader: FileReader
  config: ClipConfig
  times: np.ndarray
  frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class Explanation:
  """Prediction for a clip and its attention maps.

  Attributes:
    clip: input of the model.
    prediction: most probable class.
    probability: its probability.
    query: query patch of the space and motion attention maps.
    heat_maps: attention maps; rollout is the last one.
  """

  clip: CenterClip
  prediction: str
  probability: float
  query: Patch
  heat_maps: Sequence[HeatMap]

  def __str__(self) -> str:
    return f'{self.clip.path.name}: {self.prediction} {100 * self.probability:.1f} %'

  def write_figure(self, path: Path) -> None:
    """Writes a PNG with film strips of the clip and of its attention maps."""
    image = Image.fromarray(draw_heat_maps(self.clip.frames, self.heat_maps, str(self)))
    with atomic_path(path) as temporary:
      image.save(temporary, 'PNG')

  def write_overlay(self, path: Path) -> None:
    """Writes an MP4 of attention rollout over all frames that the clip spans."""
    reader = self.clip.reader
    fps = min(reader.num_frames / reader.duration, _MAX_FPS)
    write_frames(path, _overlay_frames(self.clip, self.heat_maps[-1].weights, fps), fps)


def explain(video: Path, checkpoint: Checkpoint, *, block: int = -1, query: Patch | None = None) -> Explanation:
  """Computes the attention maps of a video's center clip.

  Args:
    video: video file.
    checkpoint: checkpoint of the model.
    block: index over the blocks of all stages; each kind of attention uses its last block up to this one.
    query: patch whose attention weights are shown; None is the patch with the largest rollout value.

  Raises:
    UserError: the video cannot be read, or the model does not have the block or patch.
  """
  config = checkpoint.config.model
  check_query(config, block, query)
  clip = read_center_clip(video, checkpoint.config.clip)
  kinds = map_kinds(config, block)
  attention_maps = jax.jit(make_attention_maps(build_model(config), kinds, query, checkpoint.normalization))
  logits, patches, maps = jax.device_get(attention_maps(checkpoint.params, clip.frames[None]))
  probabilities = np.asarray(jax.nn.softmax(logits[0]))
  best = int(probabilities.argmax())
  frame, row, column = patches[0].tolist()
  return Explanation(
    clip=clip,
    prediction=checkpoint.class_names[best],
    probability=float(probabilities[best]),
    query=(frame, row, column),
    heat_maps=heat_maps(kinds, [weights[0] for weights in maps], patches[0], config),
  )


def check_query(config: MEViTConfig, block: int, query: Patch | None) -> None:
  """Raises a UserError if the model does not have this block or patch."""
  if not -config.depth <= block < config.depth:
    raise UserError(f'--block must be 0 to {config.depth - 1}, as the model has {config.depth} blocks, not {block}')
  sizes = config.frames, *config.grid
  if query and not all(0 <= index < size for index, size in zip(query, sizes, strict=True)):
    raise UserError(
      f'--query={",".join(map(str, query))} is out of range: the model has {sizes[0]} frames of '
      f'{sizes[1]} x {sizes[2]} patches, so the last patch is {",".join(str(size - 1) for size in sizes)}'
    )


def read_center_clip(video: Path, config: ClipConfig) -> CenterClip:
  """Reads the center clip and crop of a video.

  Raises:
    UserError: the file does not exist or is not a readable video.
  """
  if not video.is_file():
    raise UserError(f'{video}: no such file')
  try:
    reader = FileReader(video)
    ((_, views),) = read_views(reader, config, spans(reader), clips=1, crops=1)
  except VideoError as error:
    raise UserError(f'{video}: {error}') from None
  return CenterClip(video, reader, config, view_times(config, reader.duration, reader.num_frames)[0], views[0])


def attention_sections(config: Config, params: Params, examples: Sequence[Example]) -> list[Section]:
  """Draws the attention maps of the first `evaluation.attention_maps` examples, as a section of the report.

  With several hosts there are none: one host alone cannot run a model that is sharded over all.
  """
  examples = examples[: config.evaluation.attention_maps]
  if not examples or jax.process_count() > 1:
    return []
  kinds = map_kinds(config.model, -1)
  attention_maps = jax.jit(make_attention_maps(build_model(config.model), kinds, None, config.data.normalization))
  images = []
  for example in examples:
    _, patches, maps = jax.device_get(attention_maps(params, example.frames[None]))
    titled = heat_maps(kinds, [weights[0] for weights in maps], patches[0], config.model)
    name, probability = example.top_classes[0]
    prediction = f'{name} {100 * probability:.1f} %'
    caption = f'predicted {prediction}' + (f', label {example.label}' if example.label else '')
    images.append((draw_heat_maps(example.frames, titled, prediction), caption))
  text = (
    'Attention weights, averaged over heads: space and motion attention of the query patch (outlined), attention of '
    'the class token, and attention rollout through all blocks.'
  )
  return [Section('Attention maps', text, images)]


def _overlay_frames(clip: CenterClip, weights: np.ndarray, fps: float) -> Iterator[tuple[np.ndarray, float]]:
  """Yields the frames that the clip spans, cropped like the clip, each with its time since the first in seconds.

  Each frame is colored by the weights of the nearest frame of the clip.
  """
  times = np.arange(clip.times[0], min(clip.times[-1] + 1 / fps, clip.reader.duration), 1 / fps)
  scaled = scale_to_max(weights)
  for time, frame in zip(times.tolist(), clip.reader.frames(times), strict=True):
    box = view_boxes(clip.config, *frame.shape[:2])[0]
    nearest = int(np.abs(clip.times - time).argmin())
    colored = overlay_weights(crop_resize(frame, box, clip.config.size)[None], scaled[nearest][None])
    yield colored[0], time - times[0]
