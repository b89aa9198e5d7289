"""Exports a workdir's newest checkpoint for another library, which computes the same logits from it.

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
from mevit_jax.models.functional import build_model
from mevit_jax.parallel.mesh import MeshConfig, make_mesh
from mevit_jax.parallel.placement import placed
from mevit_jax.training.checkpoint import Checkpoints
from mevit_jax.weights import out


def export(workdir: str, to: out.Library, folder: str) -> Path:
  """Writes the newest checkpoint's weights for another library; returns their path.

  Raises:
    UserError: no checkpoint, or the library's model is not this one.
  """
  checkpoints = Checkpoints(Path(workdir).expanduser())
  try:
    about = checkpoints.about()
    recipe = recipes.recipe_of(about['recipe'])
    abstract = placed(build_model(recipe.model).abstract, make_mesh(MeshConfig(data=1)))
    step, params = checkpoints.restore_params(abstract)
  finally:
    checkpoints.close()
  path = out.export(
    folder,
    params,
    recipe.model,
    to,
    class_names=about['class_names'],
    mean=recipe.data.mean,
    std=recipe.data.std,
  )
  print(f'step {step} of {workdir} for {to}: {path}')
  return path


def main(argv: Sequence[str]) -> None:
  """Exports what the flags say."""
  command.no_arguments(argv)
  export(flags.FLAGS.workdir, flags.FLAGS.to, flags.FLAGS.folder)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Whose newest checkpoint to export.')
  flags.DEFINE_enum('to', None, ['timm', 'hf_vit', 'hf_timesformer'], 'The library, and the model in it.')
  flags.DEFINE_string('folder', None, 'Where to write; made if it is not there.')
  command.run(main, required=['workdir', 'to', 'folder'])
