"""Draws attention maps of a model for a video: the model's attention weights over the frames of a clip.

  mevit explain VIDEO --model=runs/k400 --figure=attention.png
  mevit explain VIDEO --model=runs/k400 --query=4,7,7 --block=8 --figure=attention.png --overlay=attention.mp4

The input is the center clip and center crop of the video, as in an evaluation of one view. The figure has a film strip
of the frames and one for each attention map: space attention (within the frame) and motion attention (within the block
of patches, over all frames) of the query patch, attention of the class token, and attention rollout through all blocks.
The overlay shows the rollout on all frames that the clip spans. See docs/explain.md.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mevit_jax.cli import command
from mevit_jax.errors import UserError
from mevit_jax.evaluation.attention_maps import Patch
from mevit_jax.pretrained.models import open_model
from mevit_jax.report.attention import explain

REQUIRED = ('model',)  # flags


def _parse_query(text: str) -> Patch | None:
  """Parses 'FRAME,ROW,COLUMN'; '' is None."""
  if not text:
    return None
  parts = text.split(',')
  if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
    raise UserError(f'--query must be FRAME,ROW,COLUMN of a patch, such as 4,7,7, not {text!r}')
  frame, row, column = map(int, parts)
  return frame, row, column


def main(argv: Sequence[str]) -> None:
  """Draws the attention maps of the video that the argument names."""
  if len(argv) != 2:
    raise UserError(f'give one video file, not {len(argv) - 1}; see --help')
  options, video = flags.FLAGS, Path(argv[1]).expanduser()
  if not options.figure and not options.overlay:
    raise UserError('nothing to write: give --figure=FILE.png, --overlay=FILE.mp4 or both')
  for name, suffix in (('figure', '.png'), ('overlay', '.mp4')):
    command.check_output(name, getattr(options, name), (suffix,), [video])
  query = _parse_query(options.query)
  checkpoint = open_model(options.model, options.checkpoint)
  explanation = explain(video, checkpoint, block=options.block, query=query)
  frame, row, column = explanation.query
  print(f'{explanation}; query: frame {frame}, row {row}, column {column}', flush=True)
  if options.figure:
    explanation.write_figure(Path(options.figure).expanduser())
    print(f'wrote {options.figure}', flush=True)
  if options.overlay:
    explanation.write_overlay(Path(options.overlay).expanduser())
    print(f'wrote {options.overlay}', flush=True)


def define_flags() -> None:
  """Defines the flags of this command."""
  command.define_model_flag('Model to explain')
  flags.DEFINE_string('checkpoint', 'last', "Checkpoint: 'last', 'best' or a step.")
  flags.DEFINE_integer(
    'block', -1, 'Index over the blocks of all stages; each kind of attention uses its last block up to this one.'
  )
  flags.DEFINE_string('query', '', "Query patch FRAME,ROW,COLUMN, from 0; '' is the patch with the largest rollout.")
  flags.DEFINE_string('figure', None, 'PNG to write.')
  flags.DEFINE_string('overlay', None, 'MP4 to write: attention rollout on the frames.')
