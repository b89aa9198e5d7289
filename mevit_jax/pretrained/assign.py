"""A source's arrays land in a model's params; every parameter gets a row that says where it is from."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.functional import Model, Params, init_motion, parameter_shapes
from mevit_jax.pretrained.positions import resize_space, resize_time
from mevit_jax.pretrained.source import Source

_COPIED = {'zero': 'space attention, with an output of zero', 'copy': 'space attention'}


@dataclasses.dataclass(frozen=True)
class Row:
  """What became of a parameter (or of a name of the source, where it is unused).

  Attributes:
    status: 'loaded', 'resized', 'copied' (from another block or attention), 'fresh' or 'unused'.
    name: the parameter's path; of an unused one, the source's name.
    shape: of the parameter, or ().
    note: where it is from, or why.
  """

  status: str
  name: str
  shape: tuple[int, ...]
  note: str


class Assignment:
  """One landing: reads what the model needs of a source, and keeps account."""

  def __init__(self, source: Source, model: Model, head: np.ndarray | None, head_note: str):
    """`head` has, for each class of the model, the source's class; None starts a fresh head."""
    self.source, self.model, self.config = source, model, model.config
    self._head, self._head_note = head, head_note
    self._read: set[str] = set()
    self.rows: list[Row] = []

  def params(self, key: jax.Array) -> Params:
    """The params, as NumPy arrays; `key` is for what starts at random."""
    params: Params = {}
    for name, shape in parameter_shapes(self.model.abstract).items():
      if '/motion_attention/' not in name:
        _put(params, name, self._parameter(name, shape))
    if self.config.motion_blocks:
      self._motion(params, key)
    self.rows += self._unused()
    return params

  def _parameter(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    stage, blocks, _ = name.partition('/blocks/')
    if blocks:
      return self._stacked(name, shape, self._class_block if stage == 'class' else self._patch_block)
    if name.startswith('head/'):
      return self._head_parameter(name, shape)
    if name == 'embedding/space':
      return self._space(name, shape)
    if name == 'embedding/time':
      return self._time(name, shape)
    self._row('loaded', name, shape, self._from(name))
    return self._get(name, shape)

  def _stacked(self, name: str, shape: tuple[int, ...], place: Callable[[str, int], tuple[str, bool]]) -> np.ndarray:
    """A stage's parameter: the arrays of its blocks, one after the other."""
    stacked = np.empty(shape, np.float32)
    places = [place(name, i) for i in range(shape[0])]
    for i, (one, _) in enumerate(places):
      stacked[i] = self._get(one, shape[1:])
    copied = any(again for _, again in places)
    self._row('copied' if copied else 'loaded', name, shape, self._from(places[0][0], places[-1][0]))
    return stacked

  def _patch_block(self, name: str, i: int) -> tuple[str, bool]:
    """Where block i of the space or motion stage is from; it is not a second copy."""
    stage, _, rest = name.partition('/blocks/')
    return f'blocks/{i + (self.config.space_blocks if stage == "motion" else 0)}/{rest}', False

  def _class_block(self, name: str, i: int) -> tuple[str, bool]:
    """A class block: the source's own, else its next block, else its last one again."""
    rest, own = name.partition('/blocks/')[2], 0
    while f'class_blocks/{own}/{rest}' in self.source.arrays:
      own += 1
    if own:
      return f'class_blocks/{min(i, own - 1)}/{rest}', i >= own
    last, wanted = self.source.info.depth - 1, self.config.space_blocks + self.config.motion_blocks + i
    return f'blocks/{min(wanted, last)}/{rest.replace("class_attention", "space_attention")}', wanted > last

  def _head_parameter(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if self._head is None:
      self._row('fresh', name, shape, f'zeros: {self._head_note}')
      return np.zeros(shape, np.float32)
    whole = (*shape[:-1], self.source.info.classes)
    self._row('loaded', name, shape, self._from(name) + self._head_note)
    return self._get(name, whole)[..., self._head]

  def _space(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    info = self.source.info
    grid = self._get(name, (info.grid[0] * info.grid[1], shape[-1])).reshape(*info.grid, -1)
    how = 'bicubic, antialiased' if info.antialias else 'bicubic, not antialiased'
    wanted = self.config.grid
    same = info.grid == wanted
    changes = '' if same else f' ({_by(info.grid)} to {_by(wanted)}, {how})'
    self._row('loaded' if same else 'resized', name, shape, self._from(name) + changes)
    return resize_space(grid, wanted, antialias=info.antialias)

  def _time(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    frames = self.source.info.frames
    if not frames:
      self._row('fresh', name, shape, 'zeros: the source is a model of images')
      return np.zeros(shape, np.float32)
    same = frames == shape[0]
    changes = '' if same else f' ({frames} to {shape[0]} frames, linear)'
    self._row('loaded' if same else 'resized', name, shape, self._from(name) + changes)
    return resize_time(self._get(name, (frames, shape[-1])), shape[0])

  def _motion(self, params: Params, key: jax.Array) -> None:
    """Motion attention: the source's where a block has it, else as the config starts it."""
    config = self.config
    theirs = [f'blocks/{config.space_blocks + i}/motion_attention' for i in range(config.motion_blocks)]
    has = [f'{one}/norm/scale' in self.source.arrays for one in theirs]
    start = {} if all(has) else self._start(params, key)
    for name, shape in parameter_shapes(self.model.abstract).items():
      rest = name.partition('/motion_attention/')[2]
      if not rest:
        continue
      array = np.array(_get(start, rest)) if start else np.empty(shape, np.float32)
      for i, one in enumerate(theirs):
        if has[i]:
          array[i] = self._get(f'{one}/{rest}', shape[1:])
      _put(params, name, array)
      self._motion_row(name, shape, [f'{one}/{rest}' for one in theirs], has)

  def _start(self, params: Params, key: jax.Array) -> Params:
    """Motion attention as the config starts it."""
    blocks = params['motion']['blocks']
    if self.config.motion_init == 'random':
      return jax.jit(lambda key: self.model.init(key)['motion']['blocks']['motion_attention'])(key)
    started = init_motion({'motion': {'blocks': blocks}}, self.config.motion_init)
    return started['motion']['blocks']['motion_attention']

  def _motion_row(self, name: str, shape: tuple[int, ...], theirs: list[str], has: list[bool]) -> None:
    if all(has):
      self._row('loaded', name, shape, self._from(theirs[0], theirs[-1]))
      return
    start = self.config.motion_init
    status, note = ('fresh', 'random') if start == 'random' else ('copied', _COPIED[start])
    loaded = [i for i, there in enumerate(has) if there]
    also = f'; blocks {", ".join(map(str, loaded))} are loaded' if loaded else ''
    self._row(status, name, shape, note + also)

  def _get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the source, as float32, of this very shape."""
    array = np.asarray(self.source.arrays[name], np.float32)
    self._read.add(name)
    if array.shape != tuple(shape):
      raise UserError(
        f'{self._from(name)} becomes {name} {array.shape}, which must be {tuple(shape)}: '
        'the source is damaged, or of another size'
      )
    if not np.isfinite(array).all():
      raise UserError(f'{self._from(name)} has numbers that are not finite: the source is damaged')
    return array

  def _from(self, first: str, last: str | None = None) -> str:
    """Their names of one of our names, or of the same in a row of blocks: 'blocks.{4-10}.norm1.weight'."""
    theirs = ' '.join(self.source.origin[first])
    if last is None or last == first:
      return theirs
    start, end = (name.split('/')[1] for name in (first, last))
    return re.sub(rf'(?<!\d){start}(?!\d)', f'{{{start}-{end}}}', theirs, count=len(self.source.origin[first]))

  def _row(self, *row) -> None:
    self.rows.append(Row(*row))

  def _unused(self) -> Iterator[Row]:
    """The rest of the source."""
    for name, why in self.source.unused.items():
      yield Row('unused', name, (), why)
    read = {theirs for name in self._read for theirs in self.source.origin[name]}
    for name, theirs in self.source.origin.items():
      for one in theirs:
        if one not in read:
          read.add(one)
          yield Row('unused', one, (), self._why(name))

  def _why(self, name: str) -> str:
    if name.startswith('head/'):
      return self._head_note
    block, motion, _ = name.partition('/motion_attention/')
    if motion and f'{block}/mlp/norm/scale' in self._read:
      return 'this block of the model has no motion attention'
    return 'the model has fewer blocks'


def check_sizes(source: Source, config: MEViTConfig) -> None:
  """Refuses a source that is not of the model's size, in one line."""
  info = source.info
  wrong = [
    f'config.model.{name} is {_plain(getattr(config, name))}, and {_plain(getattr(info, name))} there'
    for name in ('width', 'heads', 'mlp_dim', 'patch_size')
    if getattr(info, name) not in (None, getattr(config, name))
  ]
  needs = config.space_blocks + config.motion_blocks
  if needs > info.depth:
    wrong.append(f'config.model has {needs} space and motion blocks, and there are {info.depth} there')
  if wrong:
    raise UserError(f'{info.kind} is not of the size of the model: {"; ".join(wrong)}')


def format_table(rows: Sequence[Row]) -> str:
  """The rows as lines; unused names that differ only in the number of their block are one line."""
  lines, counts, first = [], dict[tuple[str, str], int](), dict[tuple[str, str], Row]()
  for row in rows:
    if row.status == 'unused':
      kind = re.sub(r'\d+', '', row.name), row.note
      counts[kind] = counts.get(kind, 0) + 1
      first.setdefault(kind, row)
    else:
      lines.append((row.status, row.name, ' '.join(map(str, row.shape)), row.note))
  for kind, row in first.items():
    more = f' and {counts[kind] - 1} more' if counts[kind] > 1 else ''
    lines.append((row.status, row.name + more, '', row.note))
  widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:3]]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(line, [*widths, 0], strict=True)) for line in lines)


def _by(sides: Sequence[int]) -> str:
  return 'x'.join(map(str, sides))


def _plain(value) -> str:
  return _by(value) if isinstance(value, tuple) else str(value)


def _get(tree: Params, name: str):
  for part in name.split('/'):
    tree = tree[part]
  return tree


def _put(tree: Params, name: str, array: np.ndarray) -> None:
  *parents, last = name.split('/')
  for part in parents:
    tree = tree.setdefault(part, {})
  tree[last] = array
