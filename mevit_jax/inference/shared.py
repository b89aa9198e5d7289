"""Shared models: a folder with parameters (safetensors), config.json, checksums and a model card.

`load_checkpoint` opens such a folder, so that `Predictor`, evaluation, `init_from`, `convert` and `export` accept it.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mevit_jax.checkpoint.checksums import write_checksums
from mevit_jax.checkpoint.workdir import FORMAT, SHARED
from mevit_jax.files import new_folder, write_json, write_text
from mevit_jax.models.functional import Params, count_parameters, parameter_shapes
from mevit_jax.pretrained.files import write_safetensors
from mevit_jax.pretrained.hub import hub_id, is_hub_name

logger = logging.getLogger(__name__)

_LABELS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy', 'mean_class': 'Mean class accuracy'}
_MAX_CLASS_NAMES = 50  # in the card


def write_shared_model(folder: Path, params: Params, metadata: dict[str, Any], results: list[dict[str, Any]]) -> Path:
  """Writes model.safetensors, config.json, checksums.json and README.md (the model card); returns the weights' path.

  Args:
    folder: folder to write, new or empty.
    params: parameters of the model.
    metadata: metadata of the checkpoint, with `checkpoint` (step and weights) and `versions`.
    results: results of evaluations of these parameters, see `read_results`.

  Raises:
    UserError: the folder is not empty, or cannot be written.
  """
  leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(params)]
  metadata = {'model_type': SHARED, **metadata, 'config': _without_paths(metadata['config']), 'format': FORMAT}
  with new_folder(folder) as temporary:
    write_safetensors(temporary / 'model.safetensors', dict(zip(parameter_shapes(params), leaves, strict=True)))
    write_json(temporary / 'config.json', metadata)
    write_checksums(temporary)
    # The card has no checksum, because its owner will edit it.
    card = _render_card(folder.resolve().name, count_parameters(params), metadata, results)
    write_text(temporary / 'README.md', card)
  return folder / 'model.safetensors'


def read_results(workdir: Path, checkpoint: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields the results.json of each evaluation of this checkpoint (step and weights) in a workdir."""
  for path in sorted(workdir.glob('evaluation/*/results.json')):
    try:
      results = json.loads(path.read_text())
    except ValueError as error:
      logger.warning('%s is damaged and not in the model card: %s', path, error)
      continue
    if results.get('checkpoint') == checkpoint and 'top1' in results:
      yield results


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config without paths of the machine that it was used on."""
  name = config['init_from']
  name = name if is_hub_name(name) else Path(name).name
  return {**config, 'data': {**config['data'], 'data_dir': 'data'}, 'init_from': name}


def _render_card(name: str, parameters: int, metadata: dict[str, Any], results: list[dict[str, Any]]) -> str:
  """Returns the model card in the format of the Hugging Face Hub."""
  import jinja2  # slow to import
  import yaml

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters['code'] = _code
  environment.filters['accuracy'] = _accuracy
  return environment.get_template('card.md').render(
    name=name,
    front_matter=yaml.safe_dump(_front_matter(name, metadata, results), sort_keys=False, allow_unicode=True),
    parameters=parameters,
    max_class_names=_MAX_CLASS_NAMES,
    results=results,
    labels=_LABELS,
    **metadata,
  )


def _front_matter(name: str, metadata: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
  dataset, source = metadata['config']['data']['dataset'], metadata['config']['init_from']
  front_matter: dict[str, Any] = {
    'library_name': 'mevit_jax',
    'pipeline_tag': 'video-classification',
    'tags': ['video-classification', 'mevit', 'jax', 'safetensors'],
    **({'datasets': [dataset]} if dataset else {}),
    **({'base_model': hub_id(source)} if is_hub_name(source) else {}),
    'metrics': ['accuracy'],
  }
  if results:
    front_matter['model-index'] = [{'name': name, 'results': [_model_index_entry(result) for result in results]}]
  return front_matter


def _model_index_entry(results: dict[str, Any]) -> dict[str, Any]:
  dataset = results['dataset']
  return {
    'task': {'type': 'video-classification'},
    'dataset': {'name': dataset['name'], 'type': dataset['name'], 'split': dataset['split']},
    'metrics': [
      {'type': 'accuracy', 'name': f'{label} ({results["protocol"]["name"]})', 'value': round(results[key], 4)}
      for key, label in _LABELS.items()
    ],
  }


def _accuracy(results: dict[str, Any], key: str) -> str:
  low, high = results[f'{key}_interval']
  return f'{100 * results[key]:.2f} % ({100 * low:.2f} to {100 * high:.2f})'


def _code(text: Any) -> str:
  """Formats any text as inline code of Markdown."""
  return '`{}`'.format(' '.join(str(text).replace('`', "'").replace('|', '/').split()))
