"""Exports a workdir's checkpoint for another library, which computes the same logits from it.

  python -m mevit_jax.export --workdir=runs/timesformer --to=hf_timesformer --folder=exported

  timm, hf_vit       a model with space blocks only, as an image classifier: its logits of a clip are those of a frame
                     that is repeated
  hf_timesformer     a model in TimeSformer's configuration (configs/timesformer.py)

Writes model.safetensors and the configs that the library reads, class names and preprocessing among them.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mevit_jax import command, recipes
from mevit_jax.training.saved import open_saved
from mevit_jax.weights import out


def export(workdir: str, to: out.Library, folder: str, checkpoint: str = 'last') -> Path:
  """Writes a checkpoint's weights for another library, their running mean where it has one; returns their path.

  Raises:
    UserError: no checkpoint, or the library's model is not this one.
  """
  saved = open_saved(Path(workdir).expanduser(), checkpoint)
  recipe, weights = recipes.recipe_of(saved.about['recipe']), saved.weights()
  path = out.export(
    folder,
    saved.params(weights),
    recipe.model,
    to,
    class_names=saved.about['class_names'],
    mean=recipe.data.mean,
    std=recipe.data.std,
  )
  print(f'step {saved.step} ({weights} weights) of {workdir} for {to}: {path}')
  return path


def main(argv: Sequence[str]) -> None:
  """Exports what the flags say."""
  command.no_arguments(argv)
  export(flags.FLAGS.workdir, flags.FLAGS.to, flags.FLAGS.folder, flags.FLAGS.checkpoint)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Whose checkpoint to export.')
  flags.DEFINE_string('checkpoint', 'last', "The 'last', the 'best' or a step.")
  flags.DEFINE_enum('to', None, ['timm', 'hf_vit', 'hf_timesformer'], 'The library, and the model in it.')
  flags.DEFINE_string('folder', None, 'Where to write; made if it is not there.')
  command.run(main, required=['workdir', 'to', 'folder'])
