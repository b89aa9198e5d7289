"""Evaluates a workdir's checkpoint: every video once, results and a picture."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mevit_jax.checkpoint.reader import Weights, load_checkpoint
from mevit_jax.checkpoint.workdir import versions
from mevit_jax.config import experiment, resolve
from mevit_jax.config.experiment import Config
from mevit_jax.data import pipeline
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.evaluation import attention_maps as explain
from mevit_jax.evaluation.protocol import Predictions, predict_all
from mevit_jax.evaluation.results import write_results
from mevit_jax.models.functional import Params, build_model
from mevit_jax.parallel.distributed import is_main_process
from mevit_jax.parallel.hosts import process_batch_slice
from mevit_jax.parallel.mesh import batch_shards, make_mesh
from mevit_jax.parallel.placement import batch_sharding, constrain_batch, shard_attention
from mevit_jax.report import heatmaps, page
from mevit_jax.report import strips as report
from mevit_jax.training.compilation_cache import enable_compilation_cache
from mevit_jax.training.malloc import configure_malloc
from mevit_jax.training.preemption import PreemptionHandler, StopError
from mevit_jax.training.steps import make_evaluation_step

# (params, video uint8 `b v t h w 3`) -> logits `b v classes`
Predict = Callable[[Params, jax.Array], jax.Array]


def evaluate(config: Config, workdir: str) -> dict[str, Any]:
  """Evaluates a checkpoint by the config's protocol, on the config's dataset.

  Raises:
    UserError: for what a config, a dataset or a workdir can have wrong.
    SystemExit: one of several processes got SIGTERM, with which a process that is alone ends at once.
  """
  configure_malloc()
  folder = Path(workdir).expanduser()
  mesh = make_mesh(config.mesh)
  checkpoint = load_checkpoint(folder, config.evaluation.checkpoint, config.evaluation.weights, mesh)
  enable_compilation_cache(folder)
  trained = checkpoint.config
  for name in ('sampling', 'stride'):
    theirs, ours = getattr(trained.data, name), getattr(config.data, name)
    if theirs != ours:
      print(f'evaluating with data.{name} {ours}; training used {theirs}', flush=True)
  source = resolve.Source(str(folder), trained.model.layer_norm_eps, checkpoint.normalization, trained)
  config, changes = resolve.resolve(config, None, source, batch_shards(mesh), evaluate=True)
  if changes:
    print(resolve.describe(changes), flush=True)
  model = build_model(config.model, constrain_batch(mesh), shard_attention(mesh))
  process_batch_slice(batch_sharding(mesh), config.evaluation.batch_size)
  step_function = make_evaluation_step(model, config.data.normalization)
  predict = jax.jit(step_function, out_shardings=batch_sharding(mesh))
  try:
    with PreemptionHandler().during_evaluation() as check:  # not entered: a signal ends a process that is alone at once
      return evaluate_params(
        config,
        predict,
        folder,
        mesh,
        checkpoint.params,
        checkpoint.step,
        checkpoint.weights,
        names=checkpoint.class_names,
        picture=True,
        check=check,
      )
  except StopError as stopped:
    print(f'stopped by {stopped.signal.name}: this evaluation has written nothing', flush=True)
    raise SystemExit(128 + stopped.signal) from None


def evaluate_params(
  config: Config,
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
    config: whose `evaluation` is the protocol.
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
  protocol = config.evaluation
  split = datasets.open_split(config.data.data_dir, config.data.dataset, protocol.split)
  if names is not None and split.class_names != names:
    there, now = ({'class_names': each, 'fingerprint': split.fingerprint} for each in (names, split.class_names))
    raise UserError(
      f'the dataset {split.dataset!r} has other classes than the checkpoint (there, and now): '
      + '; '.join(datasets.differences(there, now))
    )
  predictions = predict_split(config, predict, mesh, params, split, check)
  folder = workdir / 'evaluation' / protocol.name
  results = write_results(folder, predictions, split.class_names, _about(config, split, step, weights))
  if not is_main_process():
    return results
  print(f'evaluation {protocol.name} at step {step}: {_in_words(results)}  {folder}', flush=True)
  if picture and results['unreadable'] < results['videos']:
    _draw(workdir, folder, config, params, split, predictions, results)
  return results


def _in_words(results: dict[str, Any]) -> str:
  """Accuracy where there is one, of how many videos, and how many do not count."""
  words = [
    f'{name} {100 * results[key]:.2f} %' for key, name in (('top1', 'top-1'), ('top5', 'top-5')) if key in results
  ]
  words.append(f'of {results["videos"]} videos' if words else f'{results["videos"]} videos')
  return '  '.join([*words, *(f'{name} {results[name]}' for name in ('unlabelled', 'unreadable') if results[name])])


def predict_split(
  config: Config,
  predict: Predict,
  mesh: jax.sharding.Mesh,
  params: Params,
  split: datasets.Split,
  check: Callable[[], None] = lambda: None,
) -> Predictions:
  """What the model says of a split's videos, by the config's protocol; see `evaluate_params`."""
  protocol, rows = config.evaluation, batch_sharding(mesh)
  batches = pipeline.eval_batches(
    split.source,
    config.clip,
    clips=protocol.clips,
    crops=protocol.crops,
    batch_size=protocol.batch_size,
    rows=process_batch_slice(rows, protocol.batch_size),
    workers=config.data.workers,
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


def _about(config: Config, split: datasets.Split, step: int, weights: Weights) -> dict[str, Any]:
  """What the numbers are of: protocol, data, checkpoint, preprocessing, versions."""
  protocol = experiment.to_dict(config)['evaluation']
  del protocol['attention_maps']  # of the page
  return {
    'protocol': {
      'name': config.evaluation.name,
      **protocol,
      'views': f'{config.evaluation.clips}x{config.evaluation.crops}',
    },
    'clip': {'frames': config.clip.frames, 'sampling': config.clip.sampling, 'stride': config.clip.stride},
    'preprocessing': {'size': config.clip.size, 'mean': config.data.mean, 'std': config.data.std},
    'dataset': {'name': split.dataset, 'split': split.name, 'fingerprint': split.fingerprint},
    'checkpoint': {'step': step, 'weights': weights},
    'versions': versions(),
  }


def _draw(
  workdir: Path,
  folder: Path,
  config: Config,
  params: Params,
  split: datasets.Split,
  predictions: Predictions,
  results: dict[str, Any],
) -> None:
  """Film strips of some videos, and the report."""
  shown, worst = report.choose(predictions), page.choose_worst(predictions)
  strips = _strips(sorted({*shown, *worst}), config, split, predictions)
  title = f'{split.dataset}, {config.evaluation.name}: {_in_words(results)}'
  report.film_strips(folder / 'videos.png', [strips[i] for i in shown], title)
  page.write_page(
    folder / 'report.html',
    results,
    predictions,
    split.class_names,
    strips=[(str(predictions.ids[i]), strips[i]) for i in worst],
    metrics_file=workdir / 'metrics.jsonl',
    sections=_looks(config, params, [strips[i] for i in worst]),
  )
  print(f'film strips: {folder / "videos.png"}  report: {folder / "report.html"}', flush=True)


def _looks(config: Config, params: Params, strips: list[report.Strip]) -> list[page.Section]:
  """Where the model looks in the first of these videos; nothing on many hosts, where one cannot compute alone."""
  count = min(config.evaluation.attention_maps, len(strips))
  if not count or jax.process_count() > 1:
    return []
  model, kinds = config.model, explain.kinds_of(config.model, -1)
  looks = jax.jit(explain.make_looks(build_model(model), kinds, None, config.data.normalization))
  pictures = []
  for strip in strips[:count]:
    _, patches, maps = jax.device_get(looks(params, strip.frames[None]))
    heats = heatmaps.heat_maps(kinds, [weights[0] for weights in maps], patches[0], model)
    said = f'{strip.likeliest[0][0]} {100 * strip.likeliest[0][1]:.1f} %'
    caption = f'{said}, labelled {strip.label}' if strip.label else said
    pictures.append((heatmaps.draw(strip.frames, heats, said), caption))
  text = (
    'The weights of its attentions: what the outlined patch reads in its frame and, for motion, in its block of '
    'patches in all frames; what the class token reads; and attention rollout through all blocks.'
  )
  return [page.Section('Where the model looks', text, pictures)]


def _strips(
  chosen: list[int], config: Config, split: datasets.Split, predictions: Predictions
) -> dict[int, report.Strip]:
  """Videos as the model sees them: the first clip's centre crop."""
  subset = [split.source[i] for i in chosen]
  views = next(iter(pipeline.eval_batches(subset, config.clip, crops=1, batch_size=len(subset))))['video']
  ranked = predictions.ranked(2)
  return {
    i: report.Strip(
      frames=views[row, 0],
      label=split.class_names[int(predictions.labels[i])] if predictions.labels[i] >= 0 else '',
      likeliest=[(split.class_names[k], float(predictions.probabilities[i, k])) for k in ranked[i]],
    )
    for row, i in enumerate(chosen)
  }
