"""Evaluates a workdir's checkpoint: every video once, results and a picture."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mevit_jax import recipes
from mevit_jax.data import datasets, pipeline
from mevit_jax.errors import UserError
from mevit_jax.evaluation import explain, heatmaps, page, report
from mevit_jax.evaluation.protocol import Predictions, predict_all
from mevit_jax.evaluation.results import write_results
from mevit_jax.models.functional import Params, build_model
from mevit_jax.parallel.distributed import is_first
from mevit_jax.parallel.hosts import host_rows
from mevit_jax.parallel.mesh import make_mesh, row_shards
from mevit_jax.parallel.placement import by_rows, each_device, keep_rows
from mevit_jax.recipes import Recipe
from mevit_jax.training.heap import keep_memory
from mevit_jax.training.programs import keep_programs
from mevit_jax.training.saved import Weights, open_saved
from mevit_jax.training.steps import make_evaluation_step
from mevit_jax.training.stop import Stop, StopError
from mevit_jax.training.workdir import versions

# (params, video uint8 `b v t h w 3`) -> logits `b v classes`
Predict = Callable[[Params, jax.Array], jax.Array]


def evaluate(recipe: Recipe, workdir: str) -> dict[str, Any]:
  """Evaluates a checkpoint by the recipe's protocol, on the recipe's dataset.

  Raises:
    UserError: for what a recipe, a dataset or a workdir can have wrong.
    SystemExit: one of several processes got SIGTERM, with which a process that is alone ends at once.
  """
  keep_memory()
  folder = Path(workdir).expanduser()
  saved = open_saved(folder, recipe.evaluation.checkpoint)
  keep_programs(folder)
  weights = saved.weights(recipe.evaluation.weights)
  recipe = _as_trained(recipe, recipes.recipe_of(saved.about['recipe']), folder)
  mesh = make_mesh(recipe.mesh)
  model = build_model(recipe.model, keep_rows(mesh), each_device(mesh))
  recipe = dataclasses.replace(recipe, evaluation=recipe.evaluation.shared(row_shards(mesh)))
  host_rows(by_rows(mesh), recipe.evaluation.batch_size)
  params = saved.params(weights, mesh)
  step_function = make_evaluation_step(model, mean=recipe.data.mean, std=recipe.data.std)
  predict = jax.jit(step_function, out_shardings=by_rows(mesh))
  names = tuple(saved.about['class_names'])
  try:
    with Stop().during_evaluation() as check:  # not entered: a signal ends a process that is alone at once
      return evaluate_params(
        recipe, predict, folder, mesh, params, saved.step, weights, names=names, picture=True, check=check
      )
  except StopError as stopped:
    print(f'stopped by {stopped.signal.name}: this evaluation has written nothing', flush=True)
    raise SystemExit(128 + stopped.signal) from None


def _as_trained(recipe: Recipe, trained: Recipe, workdir: Path) -> Recipe:
  """The recipe with the checkpoint's own model and preprocessing; a UserError if it asks for another model."""
  found = recipes.differences({'model': recipes.to_dict(trained)['model']}, {'model': recipes.to_dict(recipe)['model']})
  free = ('model.classes', 'model.layer_norm_eps', 'model.motion_start', 'model.drop_path', 'model.dtype')
  found = [line for line in found if not line.startswith((*recipes.SAME_FUNCTION, *free))]
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
  weights: Weights = 'raw',
  *,
  names: tuple[str, ...] | None = None,
  picture: bool = False,
  check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Evaluates params and writes WORKDIR/evaluation/NAME/.

  Args:
    recipe: whose `evaluation` is the protocol.
    predict: the jitted evaluation step: the same for all evaluations of a run, or each compiles again.
    workdir: where to write.
    mesh: the devices.
    params: of the model.
    step: of the params.
    weights: what the params are: themselves or their running mean.
    names: of the classes as the params know them; an error if the dataset has others. None does not look.
    picture: whether to draw film strips and a report too.
    check: called after every batch; it may raise to end this.
  """
  protocol = recipe.evaluation
  split = datasets.open_split(recipe.data.data_dir, recipe.data.dataset, protocol.split)
  if names is not None and split.class_names != names:
    there, now = ({'class_names': each, 'fingerprint': split.fingerprint} for each in (names, split.class_names))
    raise UserError(
      f'the dataset {split.dataset!r} has other classes than the checkpoint (there, and now): '
      + '; '.join(datasets.differences(there, now))
    )
  predictions = predict_split(recipe, predict, mesh, params, split, check)
  folder = workdir / 'evaluation' / protocol.name
  results = write_results(folder, predictions, split.class_names, _about(recipe, split, step, weights))
  if not is_first():
    return results
  print(f'evaluation {protocol.name} at step {step}: {_in_words(results)}  {folder}', flush=True)
  if picture and results['unreadable'] < results['videos']:
    _draw(workdir, folder, recipe, params, split, predictions, results)
  return results


def _in_words(results: dict[str, Any]) -> str:
  """Accuracy where there is one, of how many videos, and how many do not count."""
  words = [
    f'{name} {100 * results[key]:.2f} %' for key, name in (('top1', 'top-1'), ('top5', 'top-5')) if key in results
  ]
  words.append(f'of {results["videos"]} videos' if words else f'{results["videos"]} videos')
  return '  '.join([*words, *(f'{name} {results[name]}' for name in ('unlabelled', 'unreadable') if results[name])])


def predict_split(
  recipe: Recipe,
  predict: Predict,
  mesh: jax.sharding.Mesh,
  params: Params,
  split: datasets.Split,
  check: Callable[[], None] = lambda: None,
) -> Predictions:
  """What the model says of a split's videos, by the recipe's protocol; see `evaluate_params`."""
  protocol, rows = recipe.evaluation, by_rows(mesh)
  batches = pipeline.eval_batches(
    split.source,
    recipe.clip,
    clips=protocol.clips,
    crops=protocol.crops,
    batch_size=protocol.batch_size,
    rows=host_rows(rows, protocol.batch_size),
    workers=recipe.data.workers,
  )
  said = time.monotonic()

  def report_progress(done: int) -> None:
    nonlocal said
    check()
    if time.monotonic() - said > 20:
      said = time.monotonic()
      print(f'evaluation {protocol.name}: {min(done, len(split))}/{len(split)} videos', flush=True)

  try:
    return predict_all(predict, params, batches, rows, report_progress, protocol.average)
  finally:
    batches.close()


def _about(recipe: Recipe, split: datasets.Split, step: int, weights: Weights) -> dict[str, Any]:
  """What the numbers are of: protocol, data, checkpoint, preprocessing, versions."""
  protocol = recipes.to_dict(recipe)['evaluation']
  del protocol['looks']  # of the page
  return {
    'protocol': {
      'name': recipe.evaluation.name,
      **protocol,
      'views': f'{recipe.evaluation.clips}x{recipe.evaluation.crops}',
    },
    'clip': {'frames': recipe.clip.frames, 'sampling': recipe.clip.sampling, 'stride': recipe.clip.stride},
    'preprocessing': {'size': recipe.clip.size, 'mean': recipe.data.mean, 'std': recipe.data.std},
    'dataset': {'name': split.dataset, 'split': split.name, 'fingerprint': split.fingerprint},
    'checkpoint': {'step': step, 'weights': weights},
    'versions': versions(),
  }


def _draw(
  workdir: Path,
  folder: Path,
  recipe: Recipe,
  params: Params,
  split: datasets.Split,
  predictions: Predictions,
  results: dict[str, Any],
) -> None:
  """Film strips of some videos, and the report."""
  shown, worst = report.choose(predictions), page.choose_worst(predictions)
  strips = _strips(sorted({*shown, *worst}), recipe, split, predictions)
  title = f'{split.dataset}, {recipe.evaluation.name}: {_in_words(results)}'
  report.film_strips(folder / 'videos.png', [strips[i] for i in shown], title)
  page.write_page(
    folder / 'report.html',
    results,
    predictions,
    split.class_names,
    strips=[(str(predictions.ids[i]), strips[i]) for i in worst],
    metrics_file=workdir / 'metrics.jsonl',
    sections=_looks(recipe, params, [strips[i] for i in worst]),
  )
  print(f'film strips: {folder / "videos.png"}  report: {folder / "report.html"}', flush=True)


def _looks(recipe: Recipe, params: Params, strips: list[report.Strip]) -> list[page.Section]:
  """Where the model looks in the first of these videos; nothing on many hosts, where one cannot compute alone."""
  count = min(recipe.evaluation.looks, len(strips))
  if not count or jax.process_count() > 1:
    return []
  config, kinds = recipe.model, explain.kinds_of(recipe.model, -1)
  looks = jax.jit(explain.make_looks(build_model(config), kinds, None, recipe.data.mean, recipe.data.std))
  pictures = []
  for strip in strips[:count]:
    _, patches, maps = jax.device_get(looks(params, strip.frames[None]))
    heats = heatmaps.heat_maps(kinds, [weights[0] for weights in maps], patches[0], config)
    said = f'{strip.likeliest[0][0]} {100 * strip.likeliest[0][1]:.1f} %'
    caption = f'{said}, labelled {strip.label}' if strip.label else said
    pictures.append((heatmaps.draw(strip.frames, heats, said), caption))
  text = (
    'The weights of its attentions: what the outlined patch reads in its frame and, for motion, in its block of '
    'patches in all frames; what the class token reads; and attention rollout through all blocks.'
  )
  return [page.Section('Where the model looks', text, pictures)]


def _strips(
  chosen: list[int], recipe: Recipe, split: datasets.Split, predictions: Predictions
) -> dict[int, report.Strip]:
  """Videos as the model sees them: the first clip's centre crop."""
  subset = [split.source[i] for i in chosen]
  views = next(iter(pipeline.eval_batches(subset, recipe.clip, crops=1, batch_size=len(subset))))['video']
  ranked = predictions.ranked(2)
  return {
    i: report.Strip(
      frames=views[row, 0],
      label=split.class_names[int(predictions.labels[i])] if predictions.labels[i] >= 0 else '',
      likeliest=[(split.class_names[k], float(predictions.probabilities[i, k])) for k in ranked[i]],
    )
    for row, i in enumerate(chosen)
  }
