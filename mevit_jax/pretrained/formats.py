"""Checkpoint formats of other libraries: rules that map their tensor names and layouts to parameters and back.

A format is a table of rules in which `{i}` stands for a block's number. Parameter names are the parameters' paths with
the blocks of all stages numbered consecutively: `class_token`, `class_position`, `registers`, `embedding/...`,
`blocks/{i}/space_attention/...`, `blocks/{i}/mlp/...`, `norm/...`, `head/...`, and `class_blocks/{i}/...` for those of
the class stage. `embedding/space` is flat here, `n d`; `registers` are `r d`.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mevit_jax.config.data import Normalization
from mevit_jax.errors import UserError
from mevit_jax.pretrained.transforms import IDENTITY, Sizes, Transform


@dataclass(frozen=True)
class Rule:
  """Source tensors, the parameters that they become, and the transform between them; most rules have one of each.

  Attributes:
    tensors: names of the source's tensors.
    params: names of the parameters.
    transform: transform between them.
    extras: tensors behind `tensors` that a source may not have; the transform then takes None.
    feature: name of what the extras are, or, without extras, all tensors of the rule, which may then be absent. A
      source has all or none of the tensors of one feature.
  """

  tensors: tuple[str, ...]
  params: tuple[str, ...]
  transform: Transform
  extras: tuple[str, ...] = ()
  feature: str = ''

  @property
  def names(self) -> tuple[str, ...]:
    """All tensors in the order of the transform."""
    return self.tensors + self.extras

  @property
  def optional(self) -> bool:
    """True if a source may have none of the tensors."""
    return bool(self.feature) and not self.extras


def rule(tensors: str, params: str, transform: Transform = IDENTITY, *, extras: str = '', feature: str = '') -> Rule:
  """Makes a rule from names separated by spaces; 'a/(x|y)/b' in `params` is short for 'a/x/b a/y/b'."""
  return Rule(tuple(tensors.split()), tuple(_expand_alternatives(params)), transform, tuple(extras.split()), feature)


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

  return tuple(replace(r, tensors=tuple(map(rename, r.tensors)), extras=tuple(map(rename, r.extras))) for r in rules)


def prefix_tensors(rules: Sequence[Rule], prefix: str) -> tuple[Rule, ...]:
  """Returns the same rules for a format in which all tensor names have a prefix."""
  return tuple(
    replace(r, tensors=tuple(prefix + n for n in r.tensors), extras=tuple(prefix + n for n in r.extras)) for r in rules
  )


def require(rules: Sequence[Rule], feature: str) -> tuple[Rule, ...]:
  """Returns the same rules for a format of which all sources have a feature."""
  return tuple(replace(r, tensors=r.names, extras=(), feature='') if r.feature == feature else r for r in rules)


def without(rules: Sequence[Rule], *params: str) -> tuple[Rule, ...]:
  """Returns the rules but those of these parameters."""
  return tuple(r for r in rules if not set(params) & set(r.params))


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
    activation: activation of its MLPs, unless the source states it; None where models of this format differ.
    head_reason: reason why its head is initialized instead of kept; '' if it reads the class token after the last norm.
  """

  name: str
  rules: tuple[Rule, ...]
  unused: tuple[tuple[str, str], ...] = ()
  prefix: str = ''
  layer_norm_eps: float = 1e-6
  normalization: Normalization | None = None
  antialias: bool = True
  activation: str | None = 'gelu'
  head_reason: str = ''

  def strip(self, name: str) -> str:
    """Returns the name without its prefix."""
    return re.sub(f'^(?:{self.prefix})', '', name)

  def unused_reason(self, name: str) -> str | None:
    """Returns the reason why a tensor has no counterpart in MEViT, or None if it is not one of those."""
    return next((reason for pattern, reason in self.unused if re.fullmatch(pattern, name)), None)

  def depth(self, names: Iterable[str]) -> int:
    """Returns the number of blocks: one more than the highest block number among the names."""
    templates = {name for rule in self.rules for name in rule.names if '{i}' in name}
    pattern = '|'.join(re.escape(name).replace(r'\{i\}', r'(\d+)') for name in templates)
    matches = (re.fullmatch(pattern, name) for name in names)
    return 1 + max((int(next(filter(None, match.groups()))) for match in matches if match), default=-1)

  def tensor_names(self, depth: int) -> dict[str, str]:
    """Returns all tensor names of a model with `depth` blocks -> the feature that needs the tensor, '' if all do."""
    names: dict[str, str] = {}
    for r, i in self._rules_of_blocks(depth):
      for name in r.names:
        feature = r.feature if r.optional or name in r.extras else ''
        full_name = name.format(i=i)
        names[full_name] = names.get(full_name, feature) and feature
    return names

  def mappings(self, depth: int) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Transform]]:
    """Yields tensor names (extras last), parameter names and their transform, rule by rule and block by block."""
    for r, i in self._rules_of_blocks(depth):
      yield tuple(n.format(i=i) for n in r.names), tuple(n.format(i=i) for n in r.params), r.transform

  def available_mappings(
    self, names: Collection[str]
  ) -> Iterator[tuple[tuple[str | None, ...], tuple[str, ...], Transform]]:
    """Yields the mappings of which the source has all tensors but extras; None stands for an extra that it lacks."""
    for r, i in self._rules_of_blocks(self.depth(names)):
      if all(name.format(i=i) in names for name in r.tensors):
        found = (name.format(i=i) for name in r.names)
        yield (
          tuple(name if name in names else None for name in found),
          tuple(n.format(i=i) for n in r.params),
          r.transform,
        )

  def _rules_of_blocks(self, depth: int) -> Iterator[tuple[Rule, int]]:
    for r in self.rules:
      for i in range(depth if any('{i}' in name for name in r.names) else 1):
        yield r, i

  def differences(self, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the names (stripped) that the format does not have, and those of the format that are missing.

    The second is a dict: name -> the feature that is incomplete without it, '' if every source needs it.
    """
    given = {name for name in names if self.unused_reason(name) is None}
    known = self.tensor_names(self.depth(given))
    features = {known[name] for name in given if name in known} | {''}
    missing = {name: feature for name, feature in known.items() if name not in given and feature in features}
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
    sizes: sizes that shapes do not state; may be set before arrays are read.
  """

  def __init__(self, checkpoint_format: CheckpointFormat, tensors: Mapping[str, np.ndarray], sizes: Sizes):
    """Checks all names; a UserError states an unknown or missing name and the nearest known one."""
    full_names = _strip_prefixes(checkpoint_format, tensors)
    reasons = {name: checkpoint_format.unused_reason(name) for name in full_names}
    self.unused = {full_names[name]: reason for name, reason in reasons.items() if reason is not None}
    self.depth, self._tensors, self.sizes = checkpoint_format.depth(full_names), tensors, sizes
    _check_names(checkpoint_format, *checkpoint_format.differences(full_names))
    self._mappings: dict[str, tuple[int, tuple[str | None, ...], Transform]] = {}
    self.origin: dict[str, tuple[str, ...]] = {}
    for tensor_names, param_names, transform in checkpoint_format.available_mappings(full_names):
      originals = tuple(full_names[name] if name else None for name in tensor_names)
      for index, name in enumerate(param_names):
        self._mappings[name] = (index, originals, transform)
        self.origin[name] = tuple(filter(None, originals))

  def __getitem__(self, name: str) -> np.ndarray:
    index, originals, transform = self._mappings[name]
    arrays = tuple(None if original is None else self._tensors[original] for original in originals)
    try:
      return transform.forward(arrays, self.sizes)[index]
    except (ValueError, IndexError) as error:
      pairs = zip(originals, arrays, strict=True)
      shapes = ', '.join(f'{original} {array.shape}' for original, array in pairs if array is not None)
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise UserError(
        f'{shapes} cannot be converted to {name} with {self.sizes.heads} heads ({reason}); check --config.model.heads'
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


def _check_names(checkpoint_format: CheckpointFormat, unknown: list[str], missing: dict[str, str]) -> None:
  if feature := next((feature for name in unknown for feature in _features(name, UNSUPPORTED)), None):
    name = next(name for name in unknown if feature in _features(name, UNSUPPORTED))
    raise UserError(f'{checkpoint_format.name} with {feature} ({name!r}), which MEViT does not have: use other weights')
  if unknown:
    known = list(missing) or list(checkpoint_format.tensor_names(max(1, checkpoint_format.depth(unknown))))
    nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)[0]
    suffix = ', which is missing' if missing else ''
    raise UserError(
      f'{checkpoint_format.name}: {_count(unknown, "unknown name")} {unknown[0]!r}; '
      f'the nearest known name is {nearest!r}{suffix}'
    )
  if not missing:
    return
  name, feature = next(iter(missing.items()))
  what = f'{feature} is incomplete, ' if feature else ''
  if absent := next(iter(_features(name, ABSENT)), None):
    raise UserError(f'{checkpoint_format.name} {absent} ({name!r} is missing), which MEViT needs: use other weights')
  raise UserError(
    f'{checkpoint_format.name}: {what}{_count(list(missing), "missing name")} {name!r}; '
    'the file is incomplete, or from another model: compare it with the published one'
  )


def _features(name: str, table: Sequence[tuple[str, str]]) -> list[str]:
  return [feature for pattern, feature in table if re.search(pattern, name)]


# Parts of tensor names -> the feature that they belong to, which MEViT does not have.
UNSUPPORTED = (
  (r'(q|k)_norm\.|norm_(q|k)\.', 'query and key norms'),
  (r'relative_position|rel_pos', 'relative positions'),
  (r'rope|inv_freq', 'rotary positions of another kind'),
  (r'mlp\.(fc1_g|fc1_x|w12|w1|w2|w3|gate_proj|weights_in|weights_out)\.|weights_(in|out)\.', 'SwiGLU'),
  (r'(attn|mlp)\.norm\.|attention\.norm\.|inner_attn_ln|ffn_ln|sub_ln', 'norms inside attention or MLP'),
  (r'\.(attns|ffns)\.|\.in_proj\.|mlp_out_proj', 'parallel attention and MLP'),
  (r'patch_embed\.(backbone|norm|stem)', 'a patch embedding that is not linear'),
  (r'(reg_token|register_tokens|storage_tokens)$', 'registers'),
  (r'(^|\.)(block_masks|router|experts)\.', 'a mixture of experts'),
)
# Tensors that every source needs, by what their absence means.
ABSENT = (
  (r'(pos_embed|position_embeddings|position_embedding\.weight|positional_embedding)$',
   'has no learned positions, perhaps rotary positions'),
  (r'norm\d?\.bias$|layer_norm\d\.bias$', 'has norms without bias, perhaps RMSNorm'),
)  # fmt: skip


def _count(names: list[str], label: str) -> str:
  return label if len(names) == 1 else f'{len(names)} {label}s, the first is'
