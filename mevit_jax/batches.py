"""Training batches of a run: clips, or features of a frozen encoder that are computed once."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mevit_jax.data import pipeline
from mevit_jax.data.sampling import Sampling
from mevit_jax.errors import UserError
from mevit_jax.experiment import Run
from mevit_jax.files import atomic_path
from mevit_jax.models.functional import Params
from mevit_jax.parallel.distributed import allgather_bytes, is_main_process
from mevit_jax.parallel.hosts import global_batch, local_shards, process_batch_slice
from mevit_jax.parallel.placement import batch_sharding
from mevit_jax.progress import Progress

Batch = dict[str, np.ndarray]


def open_batches(
  run: Run, params: Params, start_step: int, check: Callable[[], None] | None = None
) -> pipeline.Batches:
  """Returns this process's slice of every batch: clips or, with `training.cache_features`, their features.

  Args:
    run: the run.
    params: its parameters; features are those of the frozen encoder among them.
    start_step: step of the first batch.
    check: called after every batch of features that is stored; it may raise. None stores no features.
  """
  if not run.config.training.cache_features:
    return _clips(run, start_step)
  if check:
    return _CachedFeatures(run, params, start_step, check)
  return _Encoder(run, jax.tree.map(jnp.copy, params), start_step)  # a copy: training steps donate them


def device_batch(run: Run, batch: Batch) -> dict[str, jax.Array]:
  """Returns the inputs of the training step on the devices."""
  return global_batch({'video': batch['video'], 'label': batch['label']}, batch_sharding(run.mesh))


def _clips(run: Run, start_step: int) -> pipeline.Batches:
  """Returns this process's slice of every batch of clips."""
  training, data = run.config.training, run.config.data
  return pipeline.train_batches(
    run.split.source,
    run.config.clip,
    Sampling(training.seed, data.repeated_augmentation, data.class_balance, run.split.labels),
    batch_size=training.batch_size,
    start_step=start_step,
    rows=_slice(run),
    workers=data.workers,
  )


def _slice(run: Run) -> slice:
  """Returns this process's slice of the global batch."""
  return process_batch_slice(batch_sharding(run.mesh), run.config.training.batch_size)


class _Encoder:
  """Batches of features `b t n+f d` and targets `b classes` instead of clips and labels, see `make_encode_step`."""

  def __init__(self, run: Run, params: Params, start_step: int):
    self._run, self._params, self._step = run, params, start_step
    self._clips = _clips(run, start_step)

  def __iter__(self) -> '_Encoder':
    return self

  def __next__(self) -> Batch:
    clips = next(self._clips)
    features = self._run.encode(self._params, device_batch(self._run, clips), np.int32(self._step))
    self._step += 1
    return {**clips, **{name: local_shards(array) for name, array in features.items()}}

  def close(self) -> None:
    """Stops worker processes."""
    self._clips.close()


class _CachedFeatures:
  """Batches of features that are computed once and stored in WORKDIR/features.

  The batches of the first `training.cache_features` epochs are those of `_Encoder`. Later epochs have the same examples
  in another order, which the seed and the epoch determine. A file holds the examples of one step and process, and is
  complete or absent, so that a killed run computes only what is missing.
  """

  def __init__(self, run: Run, params: Params, start_step: int, check: Callable[[], None]):
    training = run.config.training
    self._folder, self._seed, self._step = run.workdir / 'features', training.seed, start_step
    self._steps = min(run.steps, math.ceil(training.cache_features * run.steps_per_epoch))
    self._rows = _slice(run)
    self._size = self._rows.stop - self._rows.start  # examples of this process in a batch
    self._dtype = jnp.dtype(run.config.model.dtype)
    self._fill(run, params, check)
    self._others = [dict(np.load(self._path(step, 'npz'))) for step in range(self._steps)]  # all but the features

  def __iter__(self) -> '_CachedFeatures':
    return self

  def __next__(self) -> Batch:
    cycle, step = divmod(self._step, self._steps)
    order = np.arange(self._steps * self._size)
    if cycle:
      order = np.random.default_rng((self._seed, cycle)).permutation(order)
    places = [divmod(int(i), self._size) for i in order[step * self._size :][: self._size]]
    self._step += 1
    others = {name: np.stack([self._others[s][name][row] for s, row in places]) for name in self._others[0]}
    return {'video': np.stack([self._features(s)[row] for s, row in places]), **others}

  def close(self) -> None:
    """Does nothing: files are open only while they are read."""

  def _path(self, step: int, suffix: str) -> Path:
    return self._folder / f'{step:06d}-{self._rows.start}-{self._rows.stop}.{suffix}'

  def _features(self, step: int) -> np.ndarray:
    """Returns the stored features of a step, memory-mapped; NumPy reads bfloat16 as raw bytes."""
    path = self._path(step, 'npy')
    try:
      return np.load(path, mmap_mode='r').view(self._dtype)
    except (OSError, ValueError) as error:
      raise UserError(f'{path} is damaged ({error}): delete {self._folder} to compute the features again') from error

  def _fill(self, run: Run, params: Params, check: Callable[[], None]) -> None:
    """Computes the features of all steps from the first that any process lacks."""
    complete = (step for step in range(self._steps) if not self._path(step, 'npz').exists())
    first = min(int(step) for step in allgather_bytes(str(next(complete, self._steps)).encode()))
    if first == self._steps:
      return
    self._folder.mkdir(exist_ok=True)
    progress, batch_size = Progress('clips encoded'), run.config.training.batch_size
    with contextlib.closing(_Encoder(run, params, first)) as batches:
      for step in range(first, self._steps):
        self._store(step, next(batches))
        if is_main_process():
          progress((step + 1) * batch_size, self._steps * batch_size)
        check()

  def _store(self, step: int, batch: Batch) -> None:
    features, others = batch['video'], {name: array for name, array in batch.items() if name != 'video'}
    with atomic_path(self._path(step, 'npy')) as path, path.open('wb') as file:
      np.save(file, features)
    with atomic_path(self._path(step, 'npz')) as path, path.open('wb') as file:  # last: it marks the step as complete
      np.savez(file, allow_pickle=False, **others)
