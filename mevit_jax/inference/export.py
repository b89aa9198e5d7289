"""Export of a checkpoint: a StableHLO model, a shared model, or the weights of another library."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from mevit_jax.checkpoint.reader import Checkpoint, load_checkpoint
from mevit_jax.checkpoint.workdir import versions
from mevit_jax.config import experiment
from mevit_jax.inference import shared, stablehlo
from mevit_jax.pretrained import export as pretrained

Target = Literal['stablehlo', 'mevit'] | pretrained.Library


@dataclasses.dataclass(frozen=True)
class Export:
  """An exported checkpoint.

  Attributes:
    path: largest file that was written.
    step: training step of the checkpoint.
    weights: 'ema' or 'raw' parameters.
  """

  path: Path
  step: int
  weights: str


def export_checkpoint(
  workdir: str | Path, to: Target, folder: str | Path, checkpoint: str = 'last', weights: str = 'auto'
) -> Export:
  """Exports the model of a checkpoint to a new folder.

  Args:
    workdir: workdir or shared model.
    to: target of the export.
    folder: folder to write, new or empty.
    checkpoint: 'last', 'best' or a step.
    weights: 'ema', 'raw', or 'auto': EMA parameters if there are any.

  Raises:
    UserError: no such checkpoint, the target cannot represent the model, or the folder is not empty or cannot be
      written.
  """
  source, target = Path(workdir).expanduser(), Path(folder).expanduser()
  loaded = load_checkpoint(source, checkpoint, weights)
  if to == 'stablehlo':
    metadata = {'class_names': loaded.class_names, 'dataset': loaded.dataset.name, **_origin(loaded)}
    path = stablehlo.write_model(target, loaded.params, loaded.config, metadata)
  elif to == 'mevit':
    metadata = {**loaded.metadata, 'config': experiment.to_dict(loaded.config), **_origin(loaded)}
    metadata.pop('window', None)  # for resuming only
    results = list(shared.read_results(source, metadata['checkpoint']))
    path = shared.write_shared_model(target, loaded.params, metadata, results)
  else:
    path = pretrained.export(
      target,
      loaded.params,
      loaded.config.model,
      to,
      class_names=loaded.class_names,
      normalization=loaded.normalization,
    )
  return Export(path, loaded.step, loaded.weights)


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
  """Returns the origin of the parameters, and the versions that export them."""
  return {
    'fingerprint': checkpoint.dataset.fingerprint,
    'checkpoint': {'step': checkpoint.step, 'weights': checkpoint.weights},
    'versions': versions(),
  }
