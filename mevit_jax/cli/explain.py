"""Shows where a workdir's model looks in a video: the weights of its own attentions, over the frames of a clip.

  mevit explain VIDEO --workdir=runs/k400 --figure=looks.png
  mevit explain VIDEO --workdir=runs/k400 --query=4,7,7 --block=8 --figure=looks.png --overlay=looks.mp4

The clip is the video's centre one, and the frames are its centre crop, as in an evaluation of one view. The figure has
a film strip of the frames, and one of each heat map: what the query patch reads in space attention (its frame) and in
motion attention (its block of patches in all frames), what the class token reads, and attention rollout through all
blocks. The overlay is the rollout, on all frames that the clip spans. docs/explain.md says more.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from mevit_jax.checkpoint.reader import load_checkpoint
from mevit_jax.cli import command
from mevit_jax.config.data import ClipConfig
from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.evaluation import attention_maps as attention
from mevit_jax.evaluation.attention_maps import Patch
from mevit_jax.models.functional import build_model
from mevit_jax.report import heatmaps
from mevit_jax.report.heatmaps import HeatMap
from mevit_jax.video.clips import crop_resize, view_boxes, view_times
from mevit_jax.video.container import VideoError
from mevit_jax.video.reader import FileReader, read_views, spans
from mevit_jax.video.write import write_frames

REQUIRED = ('workdir',)  # flags


@dataclasses.dataclass(frozen=True)
class Clip:
  """A video's centre clip and crop, as the model sees it.

  Attributes:
    reader: of the video.
    config: which frames and which crop of them it is.
    times: of the frames, in seconds, `t`.
    frames: `t h w 3`, uint8.
  """

  reader: FileReader
  config: ClipConfig
  times: np.ndarray
  frames: np.ndarray


def explain(
  video: str,
  workdir: str,
  *,
  block: int = -1,
  query: Patch | None = None,
  figure: str | None = None,
  overlay: str | None = None,
  checkpoint: str = 'last',
) -> list[HeatMap]:
  """Draws where the model looks; returns the heat maps, rollout last.

  Args:
    video: a file.
    workdir: of the model.
    block: of all stages' blocks; each kind of attention is that of the last block up to this one which has it.
    query: the patch whose weights are shown; None is the one that rollout finds most important.
    figure: a PNG to write.
    overlay: an MP4 to write.
    checkpoint: 'last', 'best' or a step.

  Raises:
    UserError: the video cannot be read, there is no checkpoint, or the model has no such block or patch.
  """
  saved = load_checkpoint(workdir, checkpoint)
  recipe = saved.config
  config = recipe.model
  check(config, block, query)
  clip = read_clip(Path(video).expanduser(), recipe.clip)
  params = saved.params
  kinds = attention.kinds_of(config, block)
  looks = attention.make_looks(build_model(config), kinds, query, saved.normalization)
  logits, patches, maps = jax.device_get(jax.jit(looks)(params, clip.frames[None]))
  heats = heatmaps.heat_maps(kinds, [weights[0] for weights in maps], patches[0], config)
  patch = 'frame {}, row {}, column {}'.format(*patches[0])
  probabilities = np.asarray(jax.nn.softmax(logits[0]))
  best = int(probabilities.argmax())
  said = f'{saved.class_names[best]} {100 * probabilities[best]:.1f} %'
  print(f'{Path(video).name}: {said}; query: {patch}', flush=True)
  if figure:
    picture = heatmaps.draw(clip.frames, heats, f'{Path(video).name}: {said}')
    Image.fromarray(picture).save(Path(figure).expanduser(), 'PNG')
  if overlay:
    fps = min(clip.reader.num_frames / clip.reader.duration, 60)
    write_frames(Path(overlay).expanduser(), overlaid(clip, heats[-1].weights, fps), fps)
  return heats


def check(config: MEViTConfig, block: int, query: Patch | None) -> None:
  """Raises a UserError for a block or a patch that the model does not have."""
  if not -config.depth <= block < config.depth:
    raise UserError(f'the model has {config.depth} blocks: --block is one of 0 to {config.depth - 1}, not {block}')
  sides = config.frames, *config.grid
  if query and not all(0 <= x < side for x, side in zip(query, sides, strict=True)):
    raise UserError(
      f'the model has {sides[0]} frames of {sides[1]} x {sides[2]} patches: no query {",".join(map(str, query))}; '
      f'the last is {",".join(str(side - 1) for side in sides)}'
    )


def read_clip(video: Path, config: ClipConfig) -> Clip:
  """The video's centre clip and crop; a UserError that names the file where it cannot be read."""
  if not video.is_file():
    raise UserError(f'{video}: there is no such file')
  try:
    reader = FileReader(video)
    ((_, views),) = read_views(reader, config, spans(reader), clips=1, crops=1)
  except VideoError as error:
    raise UserError(f'{video}: {error}') from None
  return Clip(reader, config, view_times(config, reader.duration, reader.num_frames)[0], views[0])


def overlaid(clip: Clip, weights: np.ndarray, fps: float) -> Iterator[tuple[np.ndarray, float]]:
  """The frames that the clip spans, cut as the clip is, each under the map of the nearest of the clip's frames.

  Each comes with its time since the first one's, in seconds; there are `fps` a second.
  """
  times = np.arange(clip.times[0], min(clip.times[-1] + 1 / fps, clip.reader.duration), 1 / fps)
  heat = heatmaps.scaled(weights)
  for time, frame in zip(times.tolist(), clip.reader.frames(times), strict=True):
    box = view_boxes(clip.config, *frame.shape[:2])[0]
    nearest = int(np.abs(clip.times - time).argmin())
    shaded = heatmaps.shade(crop_resize(frame, box, clip.config.size)[None], heat[nearest][None])
    yield shaded[0], time - times[0]


def _patch(text: str) -> Patch | None:
  """'4,7,7' -> frame, row and column."""
  if not text:
    return None
  parts = text.split(',')
  if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
    raise UserError(f'--query is FRAME,ROW,COLUMN of a patch, such as 4,7,7, not {text!r}')
  frame, row, column = map(int, parts)
  return frame, row, column


def main(argv: Sequence[str]) -> None:
  """Explains the one argument."""
  if len(argv) != 2:
    raise UserError('name the video to look at, one file (--help tells all)')
  options = flags.FLAGS
  if not options.figure and not options.overlay:
    raise UserError('nothing to write: give --figure=FILE.png, --overlay=FILE.mp4 or both')
  for name, suffix in (('figure', '.png'), ('overlay', '.mp4')):
    command.check_output(name, getattr(options, name), (suffix,), [Path(argv[1]).expanduser()])
  explain(
    argv[1],
    options.workdir,
    block=options.block,
    query=_patch(options.query),
    figure=options.figure,
    overlay=options.overlay,
    checkpoint=options.checkpoint,
  )


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('workdir', None, 'Whose model to look at.')
  flags.DEFINE_string('checkpoint', 'last', "The 'last', the 'best' or a step.")
  flags.DEFINE_integer('block', -1, 'Of all blocks; each attention is of the last one up to it that has it.')
  flags.DEFINE_string('query', '', "FRAME,ROW,COLUMN of a patch, from 0; '' is where rollout is largest.")
  flags.DEFINE_string('figure', None, 'The PNG to write.')
  flags.DEFINE_string('overlay', None, 'The MP4 to write: rollout on the frames.')
