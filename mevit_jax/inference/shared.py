"""A model to share: its params under our names (safetensors), config.json, checksums, and a model card.

`load_checkpoint` opens such a folder, so that `Predictor`, evaluation, `init_from`, `convert` and `export` take it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from mevit_jax.checkpoint.checksums import write_checksums
from mevit_jax.checkpoint.workdir import FORMAT, SHARED
from mevit_jax.files import new_folder
from mevit_jax.models.functional import Params, count_parameters, parameter_shapes

_LABELS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy', 'mean_class': 'Mean class accuracy'}
_FEW = 50  # class names that the card lists


def write_shared(folder: Path, params: Params, about: dict[str, Any], results: list[dict[str, Any]]) -> Path:
  """Writes model.safetensors, config.json, checksums.json and README.md, the card; returns the weights' path.

  Args:
    folder: new, or empty.
    params: of the model.
    about: what a workdir says of itself, and `checkpoint` (step and weights) and `versions`.
    results: of evaluations of these params, see `results_of`.

  Raises:
    UserError: the folder is not empty, or cannot be written.
  """
  leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(params)]
  about = {'model_type': SHARED, **about, 'config': _without_paths(about['config']), 'format': FORMAT}
  with new_folder(folder) as aside:
    save_file(dict(zip(parameter_shapes(params), leaves, strict=True)), aside / 'model.safetensors')
    (aside / 'config.json').write_text(json.dumps(about, indent=2) + '\n')
    write_checksums(aside)
    # Not among what is sealed: its owner is to write on.
    (aside / 'README.md').write_text(_card(folder.resolve().name, count_parameters(params), about, results))
  return folder / 'model.safetensors'


def results_of(workdir: Path, checkpoint: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """What results.json holds, of each of a workdir's evaluations of this checkpoint (step and weights)."""
  for path in sorted(workdir.glob('evaluation/*/results.json')):
    try:
      results = json.loads(path.read_text())
    except ValueError as error:
      print(f'{path} is damaged, and not in the card: {error}')
      continue
    if results.get('checkpoint') == checkpoint and 'top1' in results:
      yield results


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
  """The recipe without folders of the machine that it ran on."""
  return {**recipe, 'data': {**recipe['data'], 'data_dir': 'data'}, 'init_from': Path(recipe['init_from']).name}


def _card(name: str, parameters: int, about: dict[str, Any], results: list[dict[str, Any]]) -> str:
  """The model card, as Hugging Face's Hub reads it."""
  import jinja2  # takes a while: only where a card is written
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
    metadata=yaml.safe_dump(_metadata(name, about, results), sort_keys=False, allow_unicode=True),
    parameters=parameters,
    few=_FEW,
    results=results,
    labels=_LABELS,
    **about,
  )


def _metadata(name: str, about: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
  dataset = about['config']['data']['dataset']
  metadata: dict[str, Any] = {
    'library_name': 'mevit_jax',
    'pipeline_tag': 'video-classification',
    'tags': ['video-classification', 'mevit', 'jax', 'safetensors'],
    'datasets': [dataset],
    'metrics': ['accuracy'],
  }
  if results:
    metadata['model-index'] = [{'name': name, 'results': [_result(one) for one in results]}]
  return metadata


def _result(results: dict[str, Any]) -> dict[str, Any]:
  """An entry of the model index."""
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
  """Anyone's words in a line of Markdown, as they are."""
  return '`{}`'.format(' '.join(str(text).replace('`', "'").replace('|', '/').split()))
