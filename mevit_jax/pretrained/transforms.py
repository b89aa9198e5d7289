"""The engine behind every source's page: their names become ours, and ours theirs, with nothing left over.

A page is a table of rules, `{i}` being a block's number. Ours are the parameters' paths with the blocks of all stages
in one row: `class_token`, `class_position`, `embedding/...`, `blocks/{i}/space_attention/...`, `blocks/{i}/mlp/...`,
`norm/...`, `head/...`. `embedding/space` is flat here, `n d`.
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


class Change(NamedTuple):
  """What becomes of a rule's arrays: `into(theirs, heads) -> ours` and `out(ours) -> theirs`."""

  into: Callable[[Arrays, int], Arrays]
  out: Callable[[Arrays], Arrays]


def _one(into: Callable[[np.ndarray, int], np.ndarray], out: Callable[[np.ndarray], np.ndarray]) -> Change:
  return Change(lambda theirs, heads: (into(theirs[0], heads),), lambda ours: (out(ours[0]),))


def _thirds(change: Change) -> Change:
  """Queries, keys and values in one array, one after the other."""
  return Change(
    lambda theirs, heads: tuple(change.into((third,), heads)[0] for third in np.split(theirs[0], 3)),
    lambda ours: (np.concatenate([change.out((one,))[0] for one in ours]),),
  )


SAME = _one(lambda x, h: x, lambda x: x)
FLAT = _one(lambda x, h: x.reshape(-1), lambda x: x[None, None])  # 1 1 d -> d
LINEAR = _one(lambda x, h: x.T, lambda x: x.T)  # out in -> in out
CONV = _one(lambda x, h: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # d 3 ph pw -> ph pw 3 d
HEADS = _one(  # h·k d -> d h k
  lambda x, h: x.T.reshape(x.shape[1], h, -1), lambda x: x.reshape(x.shape[0], -1).T
)
HEADS_BIAS = _one(lambda x, h: x.reshape(h, -1), lambda x: x.reshape(-1))  # h·k -> h k
JOIN = _one(  # d h·k -> h k d
  lambda x, h: x.T.reshape(h, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T
)
QKV, QKV_BIAS = _thirds(HEADS), _thirds(HEADS_BIAS)
POSITIONS = Change(  # 1 1+n d -> d, n d
  lambda theirs, h: (theirs[0][0, 0], theirs[0][0, 1:]), lambda ours: (np.concatenate([ours[0][None], ours[1]])[None],)
)
TIMES = _one(lambda x, h: x.reshape(x.shape[-2:]), lambda x: x[None])  # 1 t d -> t d


@dataclass(frozen=True)
class Rule:
  """Their names, our names, and what happens in between; most rules have one of each."""

  theirs: tuple[str, ...]
  ours: tuple[str, ...]
  change: Change
  optional: bool = False


def rule(theirs: str, ours: str, change: Change = SAME, *, optional: bool = False) -> Rule:
  """A rule from names with spaces between them; 'a/(x|y)/b' in ours is short for 'a/x/b a/y/b'."""
  return Rule(tuple(theirs.split()), tuple(_spelled_out(ours)), change, optional)


def _spelled_out(names: str) -> Iterator[str]:
  for name in names.split():
    head, bracket, rest = name.partition('(')
    choices, _, tail = rest.partition(')')
    yield from (f'{head}{choice}{tail}' for choice in choices.split('|')) if bracket else (name,)


def renamed(rules: Sequence[Rule], names: Mapping[str, str]) -> tuple[Rule, ...]:
  """The same rules for a source that calls parts of its names otherwise."""

  def rename(name: str) -> str:
    for old, new in names.items():
      name = name.replace(old, new)
    return name

  return tuple(Rule(tuple(map(rename, r.theirs)), r.ours, r.change, r.optional) for r in rules)


@dataclass(frozen=True)
class CheckpointFormat:
  """A kind of source.

  Attributes:
    name: for people.
    rules: its table.
    unused: (regular expression, why) of names that MEViT has no place for.
    prefix: a regular expression of what may stand before its names.
    layer_norm_eps: of its LayerNorms, where the source itself does not say.
    pixels: how they were normalised, likewise; None where models of this kind differ.
    antialias: how the library itself resizes positions, see `positions.py`.
  """

  name: str
  rules: tuple[Rule, ...]
  unused: tuple[tuple[str, str], ...] = ()
  prefix: str = ''
  layer_norm_eps: float = 1e-6
  pixels: Normalization | None = None
  antialias: bool = True

  def strip(self, name: str) -> str:
    """The name without its prefix."""
    return re.sub(f'^(?:{self.prefix})', '', name)

  def why_unused(self, name: str) -> str | None:
    """Why MEViT has no place for this name, or None if it is not one of those."""
    return next((why for pattern, why in self.unused if re.fullmatch(pattern, name)), None)

  def depth(self, names: Iterable[str]) -> int:
    """One more than the highest number of a block that the rules know."""
    templates = {name for rule in self.rules for name in rule.theirs if '{i}' in name}
    pattern = '|'.join(re.escape(name).replace(r'\{i\}', r'(\d+)') for name in templates)
    found = (re.fullmatch(pattern, name) for name in names)
    return 1 + max((int(next(filter(None, match.groups()))) for match in found if match), default=-1)

  def names(self, depth: int) -> dict[str, bool]:
    """All names of theirs with this many blocks, and whether each is optional."""
    return {name.format(i=i): r.optional for r, i in self._each(depth) for name in r.theirs}

  def pairs(self, depth: int) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Change]]:
    """Their names, our names and the change between them, rule by rule and block by block."""
    for r, i in self._each(depth):
      yield tuple(n.format(i=i) for n in r.theirs), tuple(n.format(i=i) for n in r.ours), r.change

  def _each(self, depth: int) -> Iterator[tuple[Rule, int]]:
    for r in self.rules:
      for i in range(depth if '{i}' in r.theirs[0] else 1):
        yield r, i

  def differences(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """What these names (stripped) have that the page does not know, and what they lack."""
    given = {name for name in names if self.why_unused(name) is None}
    known = self.names(self.depth(given))
    needs_optional = any(known.get(name) for name in given)  # all of them or none
    missing = [name for name, optional in known.items() if name not in given and (needs_optional or not optional)]
    return sorted(given - set(known)), missing


def choose(pages: Sequence[CheckpointFormat], names: Sequence[str]) -> CheckpointFormat:
  """The page that differs least from these names; a UserError if that is still another thing altogether."""

  def count(page: CheckpointFormat) -> int:
    return sum(map(len, page.differences(map(page.strip, names))))

  best = min(pages, key=count)
  if count(best) > len(names) / 2:
    kinds = ', '.join(dict.fromkeys(page.name for page in pages))
    raise UserError(f'these weights are of no kind that is known here ({kinds}); their names start {list(names)[:3]}')
  return best


class Mapped(Mapping[str, np.ndarray]):
  """Our names and arrays of a source, each read when it is asked for, so that no second copy of all is in memory.

  Attributes:
    origin: our name -> their names.
    unused: their name -> why.
  """

  def __init__(self, page: CheckpointFormat, tensors: Mapping[str, np.ndarray], heads: int):
    """Checks all names; a UserError says which is unknown or missing, and names the nearest."""
    full = _stripped(page, tensors)
    self.unused = {full[name]: why for name in full if (why := page.why_unused(name)) is not None}
    self.depth, self._tensors, self._heads = page.depth(full), tensors, heads
    _refuse(page, *page.differences(full))
    self._pairs = {}
    self.origin: dict[str, tuple[str, ...]] = {}
    for theirs, ours, change in page.pairs(self.depth):
      if all(name in full for name in theirs):
        originals = tuple(full[name] for name in theirs)
        for index, name in enumerate(ours):
          self._pairs[name], self.origin[name] = (index, originals, change), originals

  def __getitem__(self, name: str) -> np.ndarray:
    index, theirs, change = self._pairs[name]
    arrays = tuple(self._tensors[one] for one in theirs)
    try:
      return change.into(arrays, self._heads)[index]
    except (ValueError, IndexError):
      shapes = ', '.join(f'{one} {array.shape}' for one, array in zip(theirs, arrays, strict=True))
      raise UserError(f'{shapes}: this cannot become {name}, with {self._heads} heads (--config.model.heads)') from None

  def __iter__(self) -> Iterator[str]:
    return iter(self._pairs)

  def __len__(self) -> int:
    return len(self._pairs)


def _stripped(page: CheckpointFormat, names: Iterable[str]) -> dict[str, str]:
  """Each name without its prefix -> the name; two that become one (raw weights and their average) are refused."""
  full: dict[str, str] = {}
  for name in names:
    other = full.setdefault(page.strip(name), name)
    if other != name:
      raise UserError(f'{page.name}: {other!r} and {name!r} differ only in their prefix: save one set of weights alone')
  return full


def _refuse(page: CheckpointFormat, unknown: list[str], missing: list[str]) -> None:
  if unknown:
    known = missing or list(page.names(max(1, page.depth(unknown))))
    nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)[0]
    lacks = ', which is missing' if missing else ''
    raise UserError(
      f'{page.name}: {_count(unknown, "unknown name")} {unknown[0]!r}; the nearest that is known is {nearest!r}{lacks}'
    )
  if missing:
    raise UserError(f'{page.name}: {_count(missing, "missing name")} {missing[0]!r}; the file is damaged or incomplete')


def _count(names: list[str], what: str) -> str:
  return what if len(names) == 1 else f'{len(names)} {what}s, the first'
