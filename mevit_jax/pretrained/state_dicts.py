"""State dicts as training scripts save them: several sets of weights in a file, and prefixes of wrappers."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from mevit_jax.errors import UserError
from mevit_jax.pretrained.formats import CheckpointFormat

# Names of the two kinds of weights in a file: timm, DeiT, TimeSformer, Lightning, DINO, I-JEPA. A teacher is the EMA of
# its student. Keys of the first kind may hold further ones.
_RAW = ('model_state', 'state_dict', 'model', 'module', 'student', 'encoder')
_EMA = (
  'model_ema', 'state_dict_ema', 'ema_state_dict', 'model_ema_state_dict', 'ema_model', 'ema', 'teacher',
  'target_encoder',
)  # fmt: skip
# Attributes under which scripts and wrappers (torch.compile, DistributedDataParallel, Lightning) keep a model.
_WRAPPERS = r'(?:_orig_mod|module|model|backbone|encoder|net|network|trunk)\.'
_FLAT = re.compile(rf'(?:{_WRAPPERS})*?({"|".join((*_EMA, "student"))})\.(.*)')
_TRAINING_ONLY = re.compile(r'(dino_|ibot_)?head\.(mlp\.\d+|last_layer)\..*')


class Choice(NamedTuple):
  """The chosen set of weights of a file.

  Attributes:
    key: name of the set in the file; '' if the file has only one.
    weights: 'ema' or 'raw'.
    unused: name of every other set -> reason.
  """

  key: str
  weights: Literal['raw', 'ema']
  unused: dict[str, str]


def choose(path: object, sizes: Mapping[str, int], wanted: str) -> Choice:
  """Chooses raw or EMA parameters.

  Args:
    path: file, for messages.
    sizes: name of each set in the file -> number of tensors.
    wanted: 'auto' takes the EMA parameters if there are any, as the scripts that save them evaluate those.

  Raises:
    UserError: no such weights.
  """
  averages = [key for key in sizes if _is_ema(key)]
  raw = [key for key in sizes if not _is_ema(key)]
  candidates = {'auto': averages or raw, 'ema': averages, 'raw': raw}[wanted]
  if not candidates:
    kind, other = ('EMA', 'raw') if wanted == 'ema' else ('raw', 'EMA')
    raise UserError(f'{path} has only {other} parameters, no {kind} ones: use init_weights=auto')
  key = candidates[0]
  unused = {
    other or 'other tensors': _unused_reason(key, other, count) for other, count in sizes.items() if other != key
  }
  return Choice(key, 'ema' if _is_ema(key) else 'raw', unused)


def _is_ema(key: str) -> bool:
  return not set(key.split('/')).isdisjoint(_EMA)


def _unused_reason(key: str, other: str, count: int) -> str:
  chosen = f'{"EMA" if _is_ema(key) else "raw"} parameters{f" {key!r}" if key else ""}'
  kind, value = ('EMA', 'ema') if _is_ema(other) else ('raw', 'raw')
  hint = '' if _is_ema(key) == _is_ema(other) else f'; init_weights={value} takes these instead'
  return f'{count} {kind} parameters; the {chosen} are used{hint}'


def nested_sets(content: Any, is_tensor: Callable[[Any], bool]) -> dict[str, dict[str, Any]]:
  """Finds the state dicts in the content of a PyTorch file: keys joined by '/' (or '' for itself) -> tensors."""
  if not isinstance(content, dict) or not content:
    return {}
  if all(isinstance(name, str) and is_tensor(value) for name, value in content.items()):
    return {'': content}
  sets = {}
  for key in (*_RAW, *_EMA):
    found = nested_sets(content.get(key), is_tensor)
    sets.update({key if len(found) == 1 else f'{key}/{inner}': tensors for inner, tensors in found.items()})
  return sets


def split_by_name(sets: Mapping[str, Iterable[str]]) -> dict[str, dict[str, tuple[str, str]]]:
  """Splits state dicts whose tensor names say which set they belong to: 'teacher.backbone.blocks.0...'.

  Args:
    sets: name -> tensor names.

  Returns:
    Name of each set -> tensor name in it -> name of the given set, and its tensor name there.
  """
  split: dict[str, dict[str, tuple[str, str]]] = {}
  for key, names in sets.items():
    for name in names:
      match = _FLAT.fullmatch(name)
      inner, rest = (match[1], match[2]) if match else ('', name)
      tensors = split.setdefault('/'.join(filter(None, (key, inner))), {})
      tensors[name if rest in tensors else rest] = (key, name)
  return split


def short_names(path: object, names: Iterable[str], formats: Sequence[CheckpointFormat]) -> dict[str, str]:
  """Returns the names without the prefixes of wrappers, in any nesting ('module._orig_mod.backbone.') -> name.

  Args:
    path: file, for messages.
    names: tensor names.
    formats: checkpoint formats; a prefix is kept where one of them has the name with it.

  Raises:
    UserError: names that become equal, of raw and averaged weights for example.
  """
  is_known = partial(_is_known, formats=tuple(formats))
  stripped = {name: next(filter(is_known, _suffixes(name)), '') for name in names}
  prefixes = {name.removesuffix(short) for name, short in stripped.items() if short}
  short_to_full: dict[str, str] = {}
  for name, short in stripped.items():
    # An unknown name loses the longest prefix of the others, so that errors can name the nearest known name.
    prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default='')
    short = short or name.removeprefix(prefix)
    other = short_to_full.setdefault(short, name)
    if other != name:
      raise UserError(f'{path}: {other!r} and {name!r} differ only in their prefix; save one set of weights alone')
  return short_to_full


def _is_known(name: str, formats: tuple[CheckpointFormat, ...]) -> bool:
  """Returns whether a format has a tensor of this name."""
  return training_only_reason(name) is not None or any(
    candidate.depth([candidate.strip(name)]) > 0
    or candidate.strip(name) in _names_outside_blocks(candidate)
    or candidate.unused_reason(candidate.strip(name)) is not None
    for candidate in formats
  )


@functools.cache
def _names_outside_blocks(checkpoint_format: CheckpointFormat) -> frozenset[str]:
  return frozenset(checkpoint_format.tensor_names(depth=0))


def _suffixes(name: str) -> Iterable[str]:
  yield name
  while match := re.match(_WRAPPERS, name):
    name = name[match.end() :]
    yield name


def training_only_reason(name: str) -> str | None:
  """Returns the reason why a tensor serves only the training of the source, or None."""
  return 'projection head of self-supervised training' if _TRAINING_ONLY.fullmatch(name) else None
