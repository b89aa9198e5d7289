"""Exports a workdir's checkpoint: to run without this package, to share, or for another library.

  mevit export --workdir=runs/mine --to=stablehlo --folder=artefact
  mevit export --workdir=runs/mine --to=mevit --folder=shared
  mevit export --workdir=runs/timesformer --to=hf_timesformer --folder=exported

  stablehlo          one file for JAX on cpu, cuda and tpu: uint8 frames in, probabilities out, any batch size; and a
                     JSON with the class names and what frames it takes
  mevit              the parameters under our own names (safetensors), with config and model card: taken by this package
                     where a workdir's checkpoint is
  timm, hf_vit       a model with space blocks only, as an image classifier: its logits of a clip are those of a frame
                     that is repeated
  hf_timesformer     a model in TimeSformer's configuration (configs/timesformer.py)

The last three write model.safetensors and the configs that the library reads, class names and preprocessing among them.
docs/export.md says more.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from absl import flags

from mevit_jax.checkpoint.reader import Checkpoint, load_checkpoint
from mevit_jax.checkpoint.workdir import versions
from mevit_jax.cli import command
from mevit_jax.config import experiment
from mevit_jax.inference import shared
from mevit_jax.inference import stablehlo as artefact
from mevit_jax.pretrained import export as out

REQUIRED = ('workdir', 'to', 'folder')  # flags

Target = Literal['stablehlo', 'mevit'] | out.Library


def export(workdir: str, to: Target, folder: str, checkpoint: str = 'last', weights: str = 'auto') -> Path:
  """Writes a checkpoint's model into a new folder; returns the path of its largest file.

  Raises:
    UserError: no checkpoint, or the library's model is not this one, or the folder is not empty.
  """
  source, target = Path(workdir).expanduser(), Path(folder).expanduser()
  started = time.perf_counter()
  saved = load_checkpoint(source, checkpoint, weights)
  if to == 'stablehlo':
    about = {'class_names': saved.class_names, 'dataset': saved.dataset.name, **_origin(saved)}
    path = artefact.write_artefact(target, saved.params, saved.config, about)
  elif to == 'mevit':
    about = {**saved.metadata, 'config': experiment.to_dict(saved.config), **_origin(saved)}
    path = shared.write_shared(target, saved.params, about, [*shared.results_of(source, about['checkpoint'])])
  else:
    path = out.export(
      target, saved.params, saved.config.model, to, class_names=saved.class_names, normalization=saved.normalization
    )
  size, seconds = path.stat().st_size / 1e6, time.perf_counter() - started
  what = f'step {saved.step} ({saved.weights} weights) of {workdir} for {to}'
  print(f'{what}: {path}, {size:.3g} MB, in {seconds:.1f} s', flush=True)
  if to == 'stablehlo':
    read, first, second = artefact.time_start(path)
    print(
      f'on {jax.default_backend()}: read in {read:.1f} s, compiled and the first clip answered in {first:.1f} s, '
      f'the next one in {second:.3f} s'
    )
  return path


def _origin(saved: Checkpoint) -> dict[str, Any]:
  """Where params are from, and what wrote them."""
  return {
    'fingerprint': saved.dataset.fingerprint,
    'checkpoint': {'step': saved.step, 'weights': saved.weights},
    'versions': versions(),
  }


def main(argv: Sequence[str]) -> None:
  """Exports what the flags say."""
  command.no_arguments(argv)
  asked = flags.FLAGS
  export(asked.workdir, asked.to, asked.folder, asked.checkpoint, asked.weights)


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('workdir', None, 'Whose checkpoint to export.')
  flags.DEFINE_string('checkpoint', 'last', "The 'last', the 'best' or a step.")
  flags.DEFINE_enum('weights', 'auto', ['auto', 'ema', 'raw'], 'auto is the running mean where there is one.')
  flags.DEFINE_enum('to', None, ['stablehlo', 'mevit', *get_args(out.Library)], 'What for; see above.')
  flags.DEFINE_string('folder', None, 'Where to write; new, or empty.')
