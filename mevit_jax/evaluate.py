"""Evaluates a workdir's checkpoint on every video of a split; writes results, example videos and a report."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mevit_jax.checkpoint.reader import Checkpoint, Weights, load_checkpoint
from mevit_jax.checkpoint.workdir import versions
from mevit_jax.config import experiment, resolve
from mevit_jax.config.experiment import Config
from mevit_jax.data import pipeline
from mevit_jax.datasets import reader as datasets
from mevit_jax.errors import UserError
from mevit_jax.evaluation.baselines import measure_baselines
from mevit_jax.evaluation.diagnosis import describe_baselines, describe_collapse
from mevit_jax.evaluation.protocol import Predictions, describe_crops, predict_all
from mevit_jax.evaluation.results import write_results
from mevit_jax.experiment import resolve_config
from mevit_jax.files import lock_folder
from mevit_jax.models.functional import Params, build_model
from mevit_jax.parallel.distributed import is_main_process
from mevit_jax.parallel.hosts import process_batch_slice
from mevit_jax.parallel.mesh import make_mesh
from mevit_jax.parallel.placement import batch_sharding, constrain_batch, shard_attention
from mevit_jax.progress import Progress
from mevit_jax.report.attention import attention_sections
from mevit_jax.report.examples import Example, choose_examples, choose_worst, draw_examples
from mevit_jax.report.html import write_report
from mevit_jax.training.compilation_cache import enable_compilation_cache
from mevit_jax.training.malloc import configure_malloc
from mevit_jax.training.preemption import PreemptionHandler, StopError
from mevit_jax.training.steps import make_evaluation_step

# (params, video uint8 `b v t h w 3`) -> logits `b v classes`
Predict = Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Everything that the evaluations of one run share.

  Attributes:
    config: config, whose `evaluation` is the protocol.
    predict: jitted evaluation step; reusing it avoids recompilation.
    workdir: workdir to write to.
    mesh: devices.
    check: callback after every batch, which may raise to stop the evaluation.
  """

  config: Config
  predict: Predict
  workdir: Path
  mesh: jax.sharding.Mesh
  check: Callable[[], None] = lambda: None


def evaluate(config: Config, workdir: str) -> dict[str, Any]:
  """Evaluates a checkpoint with the protocol and dataset of a config; returns the contents of results.json.

  Raises:
    UserError: the config, dataset or workdir is invalid.
    SystemExit: SIGTERM during an evaluation on several processes. (A single process exits at once.)
  """
  configure_malloc()
  folder = Path(workdir).expanduser()
  mesh = make_mesh(config.mesh)
  checkpoint = load_checkpoint(folder, config.evaluation.checkpoint, config.evaluation.weights, mesh)
  enable_compilation_cache(folder)
  trained = checkpoint.config
  for name in ('sampling', 'stride'):
    saved, requested = getattr(trained.data, name), getattr(config.data, name)
    if saved != requested and (name != 'stride' or config.data.sampling == 'dense'):
      print(f'data.{name} differs from training: {saved} -> {requested}', flush=True)
  source = resolve.Source(str(folder), resolve.weight_fields(trained.model), checkpoint.normalization, trained)
  config = resolve_config(config, mesh, source=source, evaluate=True)
  model = build_model(config.model, constrain_batch(mesh), shard_attention(mesh))
  process_batch_slice(batch_sharding(mesh), config.evaluation.batch_size)
  step = make_evaluation_step(model, config.data.normalization)
  evaluator = Evaluator(config, jax.jit(step, out_shardings=batch_sharding(mesh)), folder, mesh)
  try:
    with PreemptionHandler().during_evaluation() as check:  # not entered: a signal ends a single process
      evaluator = dataclasses.replace(evaluator, check=check)
      return evaluate_params(
        evaluator,
        checkpoint.params,
        checkpoint.step,
        checkpoint.weights,
        trained=checkpoint,
        report=True,
      )
  except StopError as stopped:
    print(f'stopped by {stopped.signal.name}: this evaluation has written nothing', flush=True)
    raise SystemExit(128 + stopped.signal) from None


def evaluate_params(
  evaluator: Evaluator,
  params: Params,
  step: int,
  weights: Weights = 'raw',
  *,
  trained: Checkpoint | None = None,
  report: bool = False,
) -> dict[str, Any]:
  """Evaluates parameters and writes WORKDIR/evaluation/NAME/; returns the contents of results.json.

  NAME is that of the protocol, and of what differs from training, see `evaluation_name`.

  Args:
    evaluator: config, evaluation step, workdir and devices.
    params: model parameters.
    step: training step of the parameters.
    weights: 'raw' or 'ema' parameters.
    trained: checkpoint of the parameters, whose class names the dataset must have too; None if this run trains them.
    report: draws example videos and writes the report too.
  """
  config = evaluator.config
  split = datasets.open_split(config.data.data_dir, config.data.dataset, config.evaluation.split)
  split.verify()
  if trained:
    _check_classes(split, trained)
  predictions = predict_split(evaluator, params, split)
  name = evaluation_name(config, split, trained)
  folder = evaluator.workdir / 'evaluation' / name
  metadata = _metadata(config, split, step, weights, name)
  # On every process: if others waited for one, their collectives would time out.
  baselines = measure_baselines(split, config.data.data_dir, config.data.train_split, evaluator.check)
  metadata |= {'baselines': baselines} if baselines else {}
  with _lock(folder.parent):
    results = write_results(folder, predictions, split.class_names, metadata)
    if not is_main_process():
      return results
    print(f'evaluation {name} at step {step}: {_format_results(results)}: {folder}', flush=True)
    for line in filter(None, (describe_collapse(results, split.class_names), describe_baselines(results))):
      print(line, flush=True)
    if report:
      sizes = datasets.read_sizes(split.directory, split.name)
      if hint := describe_crops(sizes, config.clip.size, config.evaluation.crops):
        print(hint, flush=True)
      if results['unreadable'] < results['videos']:
        _write_report(evaluator, folder, params, split, predictions, results)
  return results


def _check_classes(split: datasets.Split, trained: Checkpoint) -> None:
  """Raises a UserError if the split has other classes than the checkpoint."""
  saved = {'class_names': trained.class_names, 'fingerprint': split.fingerprint}
  requested = {'class_names': split.class_names, 'fingerprint': split.fingerprint}
  if saved != requested:
    raise UserError(
      f'the classes of dataset {split.dataset!r} differ from those of the checkpoint (saved -> requested): '
      + '; '.join(datasets.differences(saved, requested))
    )


def _lock(folder: Path) -> contextlib.AbstractContextManager[None]:
  """Lets one process at a time write evaluations: a run and `mevit evaluate` may have the same folder."""
  return lock_folder(folder, '', wait=True) if is_main_process() else contextlib.nullcontext()


def evaluation_name(config: Config, split: datasets.Split, trained: Checkpoint | None) -> str:
  """Returns the name of an evaluation: its protocol, then what differs from training.

  'validation-1x3' evaluates the run's own dataset and clips; 'validation-1x3-uniform' and 'validation-1x3-stride16'
  evaluate other clips, 'validation-1x3-other-1a2b3c4d' the dataset `other`, with the first digits of its fingerprint.
  Only evaluations of the same name replace each other.
  """
  parts = [config.evaluation.name]
  if trained:
    clip, own = config.clip, trained.config.clip
    if clip.sampling != own.sampling:
      parts.append(clip.sampling)
    if clip.sampling == 'dense' and clip.stride != own.stride:
      parts.append(f'stride{clip.stride}')
    if split.fingerprint != trained.dataset.fingerprint:
      parts += [re.sub(r'[^\w.]', '_', split.dataset), split.fingerprint[:8]]
  return '-'.join(parts)


def predict_split(evaluator: Evaluator, params: Params, split: datasets.Split) -> Predictions:
  """Predicts every video of a split with the protocol of the config."""
  config, sharding = evaluator.config, batch_sharding(evaluator.mesh)
  protocol = config.evaluation
  batches = pipeline.eval_batches(
    split.source,
    config.clip,
    clips=protocol.clips,
    crops=protocol.crops,
    batch_size=protocol.batch_size,
    rows=process_batch_slice(sharding, protocol.batch_size),
    workers=config.data.workers,
  )
  progress = Progress(f'evaluation {protocol.name}, videos')

  def report(done: int) -> None:
    evaluator.check()
    if is_main_process():
      progress(min(done, len(split)), len(split))

  try:
    return predict_all(evaluator.predict, params, batches, sharding, report, protocol.average)
  finally:
    batches.close()


def _format_results(results: dict[str, Any]) -> str:
  """Formats accuracy (if any video has a label) and counts: 'top-1 93.40 %, top-5 99.12 %, 1,024 videos'."""
  words = [
    f'{name} {100 * results[key]:.2f} %' for key, name in (('top1', 'top-1'), ('top5', 'top-5')) if key in results
  ]
  words.append(f'{results["videos"]:,} videos')
  return ', '.join([*words, *(f'{results[name]:,} {name}' for name in ('unlabeled', 'unreadable') if results[name])])


def _metadata(config: Config, split: datasets.Split, step: int, weights: Weights, name: str) -> dict[str, Any]:
  """Returns protocol, data, checkpoint, preprocessing and versions for results.json."""
  protocol = experiment.to_dict(config)['evaluation']
  del protocol['attention_maps']  # affects the report only
  return {
    'protocol': {
      'name': name,
      **protocol,
      'views': f'{config.evaluation.clips}x{config.evaluation.crops}',
    },
    'clip': {
      'frames': config.clip.frames,
      'sampling': config.clip.sampling,
      **({'stride': config.clip.stride} if config.clip.sampling == 'dense' else {}),
    },
    'preprocessing': {'size': config.clip.size, **config.data.normalization._asdict()},
    'dataset': {'name': split.dataset, 'split': split.name, 'fingerprint': split.fingerprint},
    'checkpoint': {'step': step, 'weights': weights},
    'versions': versions(),
  }


def _write_report(
  evaluator: Evaluator,
  folder: Path,
  params: Params,
  split: datasets.Split,
  predictions: Predictions,
  results: dict[str, Any],
) -> None:
  """Writes videos.png and report.html."""
  config = evaluator.config
  chosen, worst = choose_examples(predictions), choose_worst(predictions)
  examples = _read_examples(sorted({*chosen, *worst}), config, split, predictions)
  title = f'{split.dataset}, {config.evaluation.name}: {_format_results(results)}'
  draw_examples(folder / 'videos.png', [examples[i] for i in chosen], title)
  write_report(
    folder / 'report.html',
    results,
    predictions,
    split.class_names,
    examples=[(str(predictions.ids[i]), examples[i]) for i in worst],
    metrics_file=evaluator.workdir / 'metrics.jsonl',
    sections=attention_sections(config, params, [examples[i] for i in worst]),
  )
  print(f'example videos: {folder / "videos.png"}, report: {folder / "report.html"}', flush=True)


def _read_examples(
  indices: list[int], config: Config, split: datasets.Split, predictions: Predictions
) -> dict[int, Example]:
  """Reads videos as the model sees them: center crop of the first clip."""
  subset = [split.source[i] for i in indices]
  batches = pipeline.eval_batches(subset, config.clip, crops=1, batch_size=len(subset))
  videos = next(iter(batches))['video']  # n 1 t h w 3
  top2 = predictions.ranked(2)
  return {
    i: Example(
      frames=videos[row, 0],
      label=split.class_names[int(predictions.labels[i])] if predictions.labels[i] >= 0 else '',
      top_classes=[(split.class_names[k], float(predictions.probabilities[i, k])) for k in top2[i]],
    )
    for row, i in enumerate(indices)
  }
