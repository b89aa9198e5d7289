"""Exports a model: to run without this package, to share, or to another library.

  mevit export --model=runs/mine --to=stablehlo --folder=exported
  mevit export --model=runs/mine --to=mevit --folder=shared
  mevit export --model=runs/timesformer --to=hf_timesformer --folder=timesformer
  mevit export --model=hf://facebook/timesformer-base-finetuned-k400 --to=stablehlo --folder=exported

  stablehlo          one file for JAX on CPUs, CUDA and TPUs: uint8 frames in, probabilities out, any batch size; and a
                     JSON file with the class names and the preprocessing
  mevit              a shared model: parameters (safetensors), config and model card; this package accepts it wherever
                     it accepts a workdir
  timm, hf_vit       an image classifier, from a model that has only space blocks; it has the same logits on a clip of
                     one repeated frame
  hf_timesformer     a TimeSformer, from a model with its configuration (configs/timesformer.py)

The last three write model.safetensors and the configs of the library, with class names and preprocessing.
docs/export.md explains all of them.
"""

import time
from collections.abc import Sequence
from typing import get_args

import jax
from absl import flags

from mevit_jax.cli import command
from mevit_jax.inference.export import export_checkpoint
from mevit_jax.inference.stablehlo import time_startup
from mevit_jax.pretrained.export import Library

REQUIRED = ('model', 'to', 'folder')  # flags


def main(argv: Sequence[str]) -> None:
  """Exports the checkpoint that the flags name."""
  command.no_arguments(argv)
  options, start = flags.FLAGS, time.perf_counter()
  exported = export_checkpoint(options.model, options.to, options.folder, options.checkpoint, options.weights)
  size, seconds = exported.path.stat().st_size / 1e6, time.perf_counter() - start
  print(
    f'exported step {exported.step} ({exported.weights} parameters) of {options.model} to {options.to}: '
    f'{exported.path}, {size:.3g} MB, in {seconds:.1f} s',
    flush=True,
  )
  if options.to == 'stablehlo':
    times = time_startup(exported.path)
    print(
      f'startup on {jax.default_backend()}: read in {times.read:.1f} s, first call (with compilation) '
      f'{times.first_call:.1f} s, second call {times.second_call:.3f} s'
    )


def define_flags() -> None:
  """Defines the flags of this command."""
  command.define_model_flag('Model to export')
  flags.DEFINE_string('checkpoint', 'last', "Checkpoint: 'last', 'best' or a step.")
  flags.DEFINE_enum('weights', 'auto', ['auto', 'ema', 'raw'], 'Parameters; auto is EMA if there is any.')
  flags.DEFINE_enum('to', None, ['stablehlo', 'mevit', *get_args(Library)], 'Target of the export, see above.')
  flags.DEFINE_string('folder', None, 'Folder to write, new or empty.')
