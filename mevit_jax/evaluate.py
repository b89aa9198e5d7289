"""Evaluates a workdir's newest checkpoint: every video once, results and a picture."""

import dataclasses
import platform
import time
from collections.abc import Callable
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
from mevit_jax.models.functional import Params, build_model
from mevit_jax.parallel.hosts import host_rows
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import by_rows, placed
from mevit_jax.recipes import Recipe
from mevit_jax.training.checkpoint import Checkpoints
from mevit_jax.training.steps import make_evaluation_step

# (params, video uint8 `b v t h w 3`) -> probabilities `b classes`
Predict = Callable[[Params, jax.Array], jax.Array]


def evaluate(recipe: Recipe, workdir: str) -> dict[str, Any]:
  """Evaluates the newest checkpoint by the recipe's protocol, on the recipe's dataset."""
  folder = Path(workdir).expanduser()
  checkpoints = Checkpoints(folder)
  try:
    about = checkpoints.about()
    recipe = _as_trained(recipe, recipes.recipe_of(about['recipe']), folder)
    mesh, model = make_mesh(recipe.mesh), build_model(recipe.model)
    host_rows(by_rows(mesh), recipe.evaluation.batch_size, 'evaluation.batch_size')
    step, params = checkpoints.restore_params(placed(model.abstract, mesh))
  finally:
    checkpoints.close()
  step_function = make_evaluation_step(model, mean=recipe.data.mean, std=recipe.data.std)
  predict = jax.jit(step_function, out_shardings=by_rows(mesh))
  return evaluate_params(recipe, predict, folder, mesh, params, step, names=tuple(about['class_names']), picture=True)


def _as_trained(recipe: Recipe, trained: Recipe, workdir: Path) -> Recipe:
  """The recipe with the checkpoint's own model and preprocessing; a UserError if it asks for another model."""
  found = recipes.differences({'model': recipes.to_dict(trained)['model']}, {'model': recipes.to_dict(recipe)['model']})
  free = (
    'model.classes',
    'model.unroll',
    'model.remat',
    'model.layer_norm_eps',
    'model.motion_start',
    'model.drop_path',
    'model.dtype',
  )
  found = [line for line in found if not line.startswith(free)]
  if found:
    raise UserError(f'{workdir} has another model (there, and now): {"; ".join(found[:5])}')
  for name in ('sampling', 'stride'):
    theirs, ours = getattr(trained.data, name), getattr(recipe.data, name)
    if theirs != ours:
      print(f'evaluating with data.{name} {ours}, where training had {theirs}', flush=True)
  data = dataclasses.replace(recipe.data, mean=trained.data.mean, std=trained.data.std)
  model = dataclasses.replace(trained.model, dtype=recipe.model.dtype)
  return dataclasses.replace(recipe, model=model, data=data)


def evaluate_params(
  recipe: Recipe,
  predict: Predict,
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
    predict: the jitted evaluation step: the same for all evaluations of a run, or each compiles again.
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
  predictions = predict_split(recipe, predict, mesh, params, split)
  folder = workdir / 'evaluation' / protocol.name
  results = write_results(folder, predictions, split.class_names, _about(recipe, split, step))
  print(f'evaluation {protocol.name} at step {step}: {_in_words(results)}  {folder}', flush=True)
  if picture and results['unreadable'] < results['videos']:
    _draw(folder / 'videos.png', recipe, split, predictions, results)
  return results


def _in_words(results: dict[str, Any]) -> str:
  """Accuracy where there is one, of how many videos, and how many do not count."""
  words = [
    f'{name} {100 * results[key]:.2f} %' for key, name in (('top1', 'top-1'), ('top5', 'top-5')) if key in results
  ]
  words.append(f'of {results["videos"]} videos' if words else f'{results["videos"]} videos')
  return '  '.join([*words, *(f'{name} {results[name]}' for name in ('unlabelled', 'unreadable') if results[name])])


def predict_split(
  recipe: Recipe, predict: Predict, mesh: jax.sharding.Mesh, params: Params, split: datasets.Split
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
  said = time.monotonic()

  def report_progress(done: int) -> None:
    nonlocal said
    if time.monotonic() - said > 20:
      said = time.monotonic()
      print(f'evaluation {protocol.name}: {done}/{len(split)} videos', flush=True)

  try:
    return predict_all(predict, params, batches, rows, report_progress)
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
      label=split.class_names[int(predictions.labels[i])] if predictions.labels[i] >= 0 else '',
      likeliest=[(split.class_names[k], float(predictions.probabilities[i, k])) for k in ranked[i]],
    )
    for row, i in enumerate(shown)
  ]
  title = f'{split.dataset}, {recipe.evaluation.name}: {_in_words(results)}'
  report.film_strips(path, strips, title)
  print(f'film strips: {path}', flush=True)
