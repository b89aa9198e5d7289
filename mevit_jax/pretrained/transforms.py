"""Checkpoint formats of other libraries: rules that map their tensor names and layouts to parameters and back.

A format is a table of rules in which `{i}` stands for a block's number. Parameter names are the parameters' paths with
the blocks of all stages numbered consecutively: `class_token`, `class_position`, `embedding/...`,
`blocks/{i}/space_attention/...`, `blocks/{i}/mlp/...`, `norm/...`, `head/...`. `embedding/space` is flat here, `n d`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError

Arrays = tuple[np.ndarray, ...]


class Transform(NamedTuple):
  """Layout change of a rule's arrays: `forward(tensors, heads) -> params` and `inverse(params) -> tensors`."""

  forward: Callable[[Arrays, int], Arrays]
  inverse: Callable[[Arrays], Arrays]


def _single(forward: Callable[[np.ndarray, int], np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]) -> Transform:
  """Returns the transform of a single array."""
  return Transform(lambda tensors, heads: (forward(tensors[0], heads),), lambda params: (inverse(params[0]),))


def _fused_qkv(transform: Transform) -> Transform:
  """Returns the transform of queries, keys and values that are concatenated in one tensor."""
  return Transform(
    lambda tensors, heads: tuple(transform.forward((part,), heads)[0] for part in np.split(tensors[0], 3)),
    lambda params: (np.concatenate([transform.inverse((param,))[0] for param in params]),),
  )


IDENTITY = _single(lambda x, h: x, lambda x: x)
FLATTEN = _single(lambda x, h: x.reshape(-1), lambda x: x[None, None])  # 1 1 d -> d
LINEAR = _single(lambda x, h: x.T, lambda x: x.T)  # out in -> in out
CONV = _single(lambda x, h: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # d 3 ph pw -> ph pw 3 d
HEADS = _single(  # h·k d -> d h k
  lambda x, h: x.T.reshape(x.shape[1], h, -1), lambda x: x.reshape(x.shape[0], -1).T
)
HEADS_BIAS = _single(lambda x, h: x.reshape(h, -1), lambda x: x.reshape(-1))  # h·k -> h k
OUT_PROJECTION = _single(  # d h·k -> h k d
  lambda x, h: x.T.reshape(h, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T
)
QKV, QKV_BIAS = _fused_qkv(HEADS), _fused_qkv(HEADS_BIAS)
POSITIONS = Transform(  # 1 1+n d -> d, n d
  lambda tensors, h: (tensors[0][0, 0], tensors[0][0, 1:]),
  lambda params: (np.concatenate([params[0][None], params[1]])[None],),
)
TIME_POSITIONS = _single(lambda x, h: x.reshape(x.shape[-2:]), lambda x: x[None])  # 1 t d -> t d


@dataclass(frozen=True)
class Rule:
  """Source tensors, the parameters that they become, and the transform between them; most rules have one of each."""

  tensors: tuple[str, ...]
  params: tuple[str, ...]
  transform: Transform
  optional: bool = False


def rule(tensors: str, params: str, transform: Transform = IDENTITY, *, optional: bool = False) -> Rule:
  """Makes a rule from names separated by spaces; 'a/(x|y)/b' in `params` is short for 'a/x/b a/y/b'."""
  return Rule(tuple(tensors.split()), tuple(_expand_alternatives(params)), transform, optional)


def _expand_alternatives(names: str) -> Iterator[str]:
  for name in names.split():
    head, bracket, rest = name.partition('(')
    choices, _, tail = rest.partition(')')
    yield from (f'{head}{choice}{tail}' for choice in choices.split('|')) if bracket else (name,)


def rename_tensors(rules: Sequence[Rule], names: Mapping[str, str]) -> tuple[Rule, ...]:
  """Returns the same rules for a format in which parts of the tensor names are different."""

  def rename(name: str) -> str:
    for old, new in names.items():
      name = name.replace(old, new)
    return name

  return tuple(Rule(tuple(map(rename, r.tensors)), r.params, r.transform, r.optional) for r in rules)


@dataclass(frozen=True)
class CheckpointFormat:
  """A library's checkpoint format.

  Attributes:
    name: name of the format in messages.
    rules: mapping of its tensors to parameters.
    unused: (regular expression, reason) of tensor names that have no counterpart in MEViT.
    prefix: regular expression of prefixes that tensor names may have.
    layer_norm_eps: epsilon of its LayerNorms, unless the source states it.
    normalization: pixel normalization, unless the source states it; None where models of this format differ.
    antialias: whether the library antialiases when it resizes positions, see `positions.py`.
  """

  name: str
  rules: tuple[Rule, ...]
  unused: tuple[tuple[str, str], ...] = ()
  prefix: str = ''
  layer_norm_eps: float = 1e-6
  normalization: Normalization | None = None
  antialias: bool = True

  def strip(self, name: str) -> str:
    """Returns the name without its prefix."""
    return re.sub(f'^(?:{self.prefix})', '', name)

  def unused_reason(self, name: str) -> str | None:
    """Returns the reason why a tensor has no counterpart in MEViT, or None if it is not one of those."""
    return next((reason for pattern, reason in self.unused if re.fullmatch(pattern, name)), None)

  def depth(self, names: Iterable[str]) -> int:
    """Returns the number of blocks: one more than the highest block number among the names."""
    templates = {name for rule in self.rules for name in rule.tensors if '{i}' in name}
    pattern = '|'.join(re.escape(name).replace(r'\{i\}', r'(\d+)') for name in templates)
    matches = (re.fullmatch(pattern, name) for name in names)
    return 1 + max((int(next(filter(None, match.groups()))) for match in matches if match), default=-1)

  def tensor_names(self, depth: int) -> dict[str, bool]:
    """Returns all tensor names of a model with `depth` blocks -> True if the tensor is optional."""
    return {name.format(i=i): r.optional for r, i in self._rules_of_blocks(depth) for name in r.tensors}

  def mappings(self, depth: int) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Transform]]:
    """Yields tensor names, parameter names and the transform between them, rule by rule and block by block."""
    for r, i in self._rules_of_blocks(depth):
      yield tuple(n.format(i=i) for n in r.tensors), tuple(n.format(i=i) for n in r.params), r.transform

  def _rules_of_blocks(self, depth: int) -> Iterator[tuple[Rule, int]]:
    for r in self.rules:
      for i in range(depth if '{i}' in r.tensors[0] else 1):
        yield r, i

  def differences(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the names (stripped) that the format does not have, and those of the format that are missing."""
    given = {name for name in names if self.unused_reason(name) is None}
    known = self.tensor_names(self.depth(given))
    needs_optional = any(known.get(name) for name in given)  # all of them or none
    missing = [name for name, optional in known.items() if name not in given and (needs_optional or not optional)]
    return sorted(given - set(known)), missing


def detect_format(formats: Sequence[CheckpointFormat], names: Sequence[str]) -> CheckpointFormat:
  """Returns the format that differs least from these names.

  Raises:
    UserError: more than half of the names differ from every format.
  """

  def count(candidate: CheckpointFormat) -> int:
    return sum(map(len, candidate.differences(map(candidate.strip, names))))

  best = min(formats, key=count)
  if count(best) > len(names) / 2:
    supported = ', '.join(dict.fromkeys(candidate.name for candidate in formats))
    raise UserError(f'unknown checkpoint format: the names start with {list(names)[:3]}; supported are {supported}')
  return best


class ConvertedArrays(Mapping[str, np.ndarray]):
  """Arrays of a checkpoint by parameter name, each read on access, so that memory never holds a second copy of all.

  Attributes:
    origin: parameter name -> source tensor names.
    unused: source tensor name -> reason.
    depth: number of blocks.
  """

  def __init__(self, checkpoint_format: CheckpointFormat, tensors: Mapping[str, np.ndarray], heads: int):
    """Checks all names; a UserError states an unknown or missing name and the nearest known one."""
    full_names = _strip_prefixes(checkpoint_format, tensors)
    reasons = {name: checkpoint_format.unused_reason(name) for name in full_names}
    self.unused = {full_names[name]: reason for name, reason in reasons.items() if reason is not None}
    self.depth, self._tensors, self._heads = checkpoint_format.depth(full_names), tensors, heads
    _check_names(checkpoint_format, *checkpoint_format.differences(full_names))
    self._mappings: dict[str, tuple[int, tuple[str, ...], Transform]] = {}
    self.origin: dict[str, tuple[str, ...]] = {}
    for tensor_names, param_names, transform in checkpoint_format.mappings(self.depth):
      if all(name in full_names for name in tensor_names):
        originals = tuple(full_names[name] for name in tensor_names)
        for index, name in enumerate(param_names):
          self._mappings[name], self.origin[name] = (index, originals, transform), originals

  def __getitem__(self, name: str) -> np.ndarray:
    index, originals, transform = self._mappings[name]
    arrays = tuple(self._tensors[original] for original in originals)
    try:
      return transform.forward(arrays, self._heads)[index]
    except (ValueError, IndexError):
      shapes = ', '.join(f'{original} {array.shape}' for original, array in zip(originals, arrays, strict=True))
      raise UserError(
        f'{shapes} cannot be converted to {name} with {self._heads} heads; check --config.model.heads'
      ) from None

  def __iter__(self) -> Iterator[str]:
    return iter(self._mappings)

  def __len__(self) -> int:
    return len(self._mappings)


def _strip_prefixes(checkpoint_format: CheckpointFormat, names: Iterable[str]) -> dict[str, str]:
  """Returns name without prefix -> name; names that become equal (raw and averaged weights) are an error."""
  full_names: dict[str, str] = {}
  for name in names:
    other = full_names.setdefault(checkpoint_format.strip(name), name)
    if other != name:
      raise UserError(
        f'{checkpoint_format.name}: {other!r} and {name!r} differ only in their prefix; save one set of weights alone'
      )
  return full_names


def _check_names(checkpoint_format: CheckpointFormat, unknown: list[str], missing: list[str]) -> None:
  if unknown:
    known = missing or list(checkpoint_format.tensor_names(max(1, checkpoint_format.depth(unknown))))
    nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)[0]
    suffix = ', which is missing' if missing else ''
    raise UserError(
      f'{checkpoint_format.name}: {_count(unknown, "unknown name")} {unknown[0]!r}; '
      f'the nearest known name is {nearest!r}{suffix}'
    )
  if missing:
    raise UserError(
      f'{checkpoint_format.name}: {_count(missing, "missing name")} {missing[0]!r}; '
      'the file is damaged or incomplete, download it again'
    )


def _count(names: list[str], label: str) -> str:
  return label if len(names) == 1 else f'{len(names)} {label}s, the first is'
