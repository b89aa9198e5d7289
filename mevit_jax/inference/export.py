"""Export of a checkpoint: a StableHLO model, a shared model, or the weights of another library."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from mevit_jax.checkpoint.reader import Checkpoint
from mevit_jax.checkpoint.workdir import versions
from mevit_jax.config import experiment
from mevit_jax.inference import shared, stablehlo
from mevit_jax.pretrained import export as pretrained
from mevit_jax.pretrained.models import open_model

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
  model: str | Path, to: Target, folder: str | Path, checkpoint: str = 'last', weights: str = 'auto'
) -> Export:
  """Exports the model of a checkpoint to a new folder.

  Args:
    model: workdir, shared model, or another model with class names, see `open_model`.
    to: target of the export.
    folder: folder to write, new or empty.
    checkpoint: 'last', 'best' or a step.
    weights: 'ema', 'raw', or 'auto': EMA parameters if there are any.

  Raises:
    UserError: no such checkpoint, the target cannot represent the model, or the folder is not empty or cannot be
      written.
  """
  target = Path(folder).expanduser()
  loaded = open_model(model, checkpoint, weights)
  if to == 'stablehlo':
    metadata = {'class_names': loaded.class_names, 'dataset': loaded.dataset.name, **_origin(loaded)}
    path = stablehlo.write_model(target, loaded.params, loaded.config, metadata)
  elif to == 'mevit':
    metadata = {**loaded.metadata, 'config': experiment.to_dict(loaded.config), **_origin(loaded)}
    results = list(shared.read_results(Path(model).expanduser(), metadata['checkpoint']))
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
