"""Evaluates a workdir's newest checkpoint: every video once, results and a picture."""

import platform
import time
from pathlib import Path
from typing import Any

import jax

import mevit_jax
from mevit_jax import recipes
from mevit_jax.data import datasets, pipeline
from mevit_jax.errors import UserError
from mevit_jax.evaluation import report
from mevit_jax.evaluation.protocol import Predictions, predict_all
from mevit_jax.evaluation.results import write_results
from mevit_jax.models.functional import Model, Params, build_model
from mevit_jax.parallel.hosts import host_rows
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import by_rows, placed
from mevit_jax.recipes import Recipe
from mevit_jax.training.checkpoint import Checkpoints
from mevit_jax.training.steps import make_evaluation_step


def evaluate(recipe: Recipe, workdir: str) -> dict[str, Any]:
  """Evaluates the newest checkpoint by the recipe's protocol, on the recipe's dataset."""
  folder = Path(workdir).expanduser()
  checkpoints = Checkpoints(folder)
  try:
    about = checkpoints.about()
    trained = recipes.recipe_of(about['recipe'])
    found = recipes.differences(
      {'model': recipes.to_dict(trained)['model']}, {'model': recipes.to_dict(recipe)['model']}
    )
    found = [line for line in found if not line.startswith(('model.classes', 'model.unroll', 'model.remat'))]
    if found:
      raise UserError(f'{folder} has another model (there, and now): {"; ".join(found[:5])}')
    recipe = recipes.with_classes(recipe, about['class_names'])
    mesh, model = make_mesh(recipe.mesh), build_model(recipe.model)
    host_rows(by_rows(mesh), recipe.evaluation.batch_size, 'evaluation.batch_size')
    step, params = checkpoints.restore_params(placed(model.abstract, mesh))
  finally:
    checkpoints.close()
  return evaluate_params(recipe, model, folder, mesh, params, step, names=tuple(about['class_names']), picture=True)


def evaluate_params(
  recipe: Recipe,
  model: Model,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  params: Params,
  step: int,
  *,
  names: tuple[str, ...] | None = None,
  picture: bool = False,
) -> dict[str, Any]:
  """Evaluates params and writes WORKDIR/evaluation/NAME/.

  Args:
    recipe: whose `evaluation` is the protocol.
    model: that the params are of.
    workdir: where to write.
    mesh: the devices.
    params: of the model.
    step: of the params.
    names: of the classes as the params know them; an error if the dataset has others. None does not look.
    picture: whether to draw film strips too.
  """
  protocol = recipe.evaluation
  split = datasets.open_split(recipe.data.data_dir, recipe.data.dataset, protocol.split)
  if names is not None and split.class_names != names:
    differing = [
      f'{i}: {a!r}, and {b!r}' for i, (a, b) in enumerate(zip(names, split.class_names, strict=False)) if a != b
    ]
    raise UserError(
      f'the dataset {split.dataset!r} has other classes than the checkpoint (there, and now): {differing[:3]}'
    )
  predictions = predict_split(recipe, model, mesh, params, split)
  folder = workdir / 'evaluation' / protocol.name
  results = write_results(folder, predictions, split.class_names, _about(recipe, split, step))
  dead = f'  unreadable {results["unreadable"]}' if results['unreadable'] else ''
  print(
    f'evaluation {protocol.name} at step {step}: top-1 {100 * results["top1"]:.2f} %  '
    f'top-5 {100 * results["top5"]:.2f} %  of {results["videos"]} videos{dead}  {folder}',
    flush=True,
  )
  if picture and results['unreadable'] < results['videos']:
    _draw(folder / 'videos.png', recipe, split, predictions, results)
  return results


def describe_dataset(split: datasets.Split) -> str:
  """One line: name, split, counts and fingerprint."""
  return (
    f'{split.dataset}/{split.name}, {len(split):,} videos of {len(split.class_names)} classes, '
    f'fingerprint {split.fingerprint[:12]}'
  )


def predict_split(
  recipe: Recipe, model: Model, mesh: jax.sharding.Mesh, params: Params, split: datasets.Split
) -> Predictions:
  protocol, rows = recipe.evaluation, by_rows(mesh)
  batches = pipeline.eval_batches(
    split.source,
    recipe.clip,
    clips=protocol.clips,
    crops=protocol.crops,
    batch_size=protocol.batch_size,
    rows=host_rows(rows, protocol.batch_size, 'evaluation.batch_size'),
    workers=recipe.data.workers,
  )
  step = jax.jit(make_evaluation_step(model, mean=recipe.data.mean, std=recipe.data.std), out_shardings=rows)
  said = time.monotonic()

  def report_progress(done: int) -> None:
    nonlocal said
    if time.monotonic() - said > 20:
      said = time.monotonic()
      print(f'evaluation {protocol.name}: {done}/{len(split)} videos', flush=True)

  try:
    return predict_all(step, params, batches, rows, report_progress)
  finally:
    batches.close()


def _about(recipe: Recipe, split: datasets.Split, step: int) -> dict[str, Any]:
  """What the numbers are of: protocol, data, checkpoint, preprocessing, versions."""
  return {
    'protocol': {**recipes.to_dict(recipe)['evaluation'], 'averaged': 'probabilities over views'},
    'clip': {'frames': recipe.clip.frames, 'sampling': recipe.clip.sampling, 'stride': recipe.clip.stride},
    'preprocessing': {'size': recipe.clip.size, 'mean': recipe.data.mean, 'std': recipe.data.std},
    'dataset': {'name': split.dataset, 'split': split.name, 'fingerprint': split.fingerprint},
    'checkpoint': {'step': step},
    'versions': {'mevit_jax': mevit_jax.__version__, 'jax': jax.__version__, 'python': platform.python_version()},
  }


def _draw(path: Path, recipe: Recipe, split: datasets.Split, predictions: Predictions, results: dict[str, Any]) -> None:
  """Film strips of some videos, as the model sees them: the first clip's centre crop."""
  shown = report.choose(predictions)
  subset = [split.source[i] for i in shown]
  views = next(iter(pipeline.eval_batches(subset, recipe.clip, crops=1, batch_size=len(subset))))['video']
  ranked = predictions.ranked(2)
  strips = [
    report.Strip(
      frames=views[row, 0],
      label=split.class_names[int(predictions.labels[i])],
      likeliest=[(split.class_names[k], float(predictions.probabilities[i, k])) for k in ranked[i]],
    )
    for row, i in enumerate(shown)
  ]
  title = (
    f'{split.dataset}, {recipe.evaluation.name}: top-1 {100 * results["top1"]:.1f} % of {results["videos"]} videos'
  )
  report.film_strips(path, strips, title)
  print(f'film strips: {path}', flush=True)
