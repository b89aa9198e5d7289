"""Exports a workdir's checkpoint: to run without this package, to share, or for another library.

  python -m mevit_jax.export --workdir=runs/mine --to=stablehlo --folder=artefact
  python -m mevit_jax.export --workdir=runs/mine --to=mevit --folder=shared
  python -m mevit_jax.export --workdir=runs/timesformer --to=hf_timesformer --folder=exported

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

from mevit_jax import command, recipes
from mevit_jax.serving import artefact, shared
from mevit_jax.training.saved import Saved, Weights, open_saved
from mevit_jax.training.workdir import versions
from mevit_jax.weights import out

Target = Literal['stablehlo', 'mevit'] | out.Library


def export(workdir: str, to: Target, folder: str, checkpoint: str = 'last', weights: str = 'auto') -> Path:
  """Writes a checkpoint's model into a new folder; returns the path of its largest file.

  Raises:
    UserError: no checkpoint, or the library's model is not this one, or the folder is not empty.
  """
  source, target = Path(workdir).expanduser(), Path(folder).expanduser()
  saved = open_saved(source, checkpoint)
  recipe, kind = recipes.recipe_of(saved.about['recipe']), saved.weights(weights)
  params, names, started = saved.params(kind), saved.about['class_names'], time.perf_counter()
  pixels: dict[str, Any] = {'mean': recipe.data.mean, 'std': recipe.data.std}
  if to == 'stablehlo':
    about = {'class_names': names, 'dataset': recipe.data.dataset, **_origin(saved, kind)}
    path = artefact.write_artefact(target, params, recipe.model, recipe.clip, recipe.evaluation, **pixels, about=about)
  elif to == 'mevit':
    about = {**saved.about, 'recipe': recipes.to_dict(recipe), **_origin(saved, kind)}
    path = shared.write_shared(target, params, about, [*shared.results_of(source, about['checkpoint'])])
  else:
    path = out.export(target, params, recipe.model, to, class_names=names, **pixels)
  size, seconds = path.stat().st_size / 1e6, time.perf_counter() - started
  what = f'step {saved.step} ({kind} weights) of {workdir} for {to}'
  print(f'{what}: {path}, {size:.3g} MB, in {seconds:.1f} s', flush=True)
  if to == 'stablehlo':
    read, first, second = artefact.time_start(path)
    print(
      f'on {jax.default_backend()}: read in {read:.1f} s, compiled and the first clip answered in {first:.1f} s, '
      f'the next one in {second:.3f} s'
    )
  return path


def _origin(saved: Saved, weights: Weights) -> dict[str, Any]:
  """Where params are from, and what wrote them."""
  return {
    'fingerprint': saved.about['fingerprint'],
    'checkpoint': {'step': saved.step, 'weights': weights},
    'versions': versions(),
  }


def main(argv: Sequence[str]) -> None:
  """Exports what the flags say."""
  command.no_arguments(argv)
  asked = flags.FLAGS
  export(asked.workdir, asked.to, asked.folder, asked.checkpoint, asked.weights)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Whose checkpoint to export.')
  flags.DEFINE_string('checkpoint', 'last', "The 'last', the 'best' or a step.")
  flags.DEFINE_enum('weights', 'auto', ['auto', 'ema', 'raw'], 'auto is the running mean where there is one.')
  flags.DEFINE_enum('to', None, ['stablehlo', 'mevit', *get_args(out.Library)], 'What for; see above.')
  flags.DEFINE_string('folder', None, 'Where to write; new, or empty.')
  command.run(main, required=['workdir', 'to', 'folder'])
