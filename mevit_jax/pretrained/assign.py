"""Assignment of a source's arrays to a model's parameters, with a table that accounts for each of them."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mevit_jax.config.model import MEViTConfig
from mevit_jax.errors import UserError
from mevit_jax.models.functional import ENCODER, Model, Params, init_motion, parameter_shapes
from mevit_jax.models.mevit import STAGES
from mevit_jax.pretrained.positions import resize_space, resize_time
from mevit_jax.pretrained.source import Source
from mevit_jax.trees import get_by_name, set_by_name

_CLASS_STAGE = STAGES[-1]
_ABSENT = {
  'class_position': 'the source has no position of a class token',
  'class_token': 'the source has no class token',
  'norm/scale': 'the source has no norm before its head',
  'norm/bias': 'the source has no norm before its head',
}
_COPIED = {'zero': 'space attention, with a zero output projection', 'copy': 'space attention'}


@dataclasses.dataclass(frozen=True)
class Row:
  """Origin of a parameter, or of a source tensor that is not used.

  Attributes:
    status: 'loaded', 'resized', 'copied' (from another block or attention), 'fresh' or 'unused'.
    name: path of the parameter; for an unused tensor, its name in the source.
    shape: shape of the parameter, or ().
    note: names of the source tensors, or the reason for the status.
  """

  status: str
  name: str
  shape: tuple[int, ...]
  note: str


class Assignment:
  """Reads the arrays that a model needs from a source, and records the origin of each parameter.

  Attributes:
    rows: one row for each parameter, and for each source tensor that is not used.
  """

  def __init__(self, source: Source, model: Model, head: np.ndarray | None, head_note: str):
    """Prepares the assignment.

    Args:
      source: open source of weights.
      model: model whose parameters are assigned.
      head: class of the source for each class of the model; None initializes the head.
      head_note: note on the head for the table.
    """
    self.source, self.model, self.config = source, model, model.config
    self._head, self._head_note = head, head_note
    self._used: set[str] = set()
    self._initial: Params = {}  # initial parameters behind a space encoder
    self.rows: list[Row] = []

  def assign(self, key: jax.Array) -> Params:
    """Returns the parameters as NumPy arrays; `key` initializes what is random."""
    params: Params = {}
    if is_encoder(self.source, self.config):
      self._initial = jax.device_get(jax.jit(self._init_new)(key))
    for name, shape in parameter_shapes(self.model.abstract).items():
      if '/motion_attention/' not in name or self._is_new(name):
        set_by_name(params, name, self._parameter(name, shape))
    if self.config.motion_blocks and not is_encoder(self.source, self.config):
      self._assign_motion(params, key)
    self.rows += self._unused_rows()
    return params

  def _parameter(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    stage, blocks, _ = name.partition('/blocks/')
    if self._is_new(name):
      self._add_row('fresh', name, shape, 'behind the encoder, initialized as without pretrained weights')
      return np.array(get_by_name(self._initial, name))
    if name.startswith('space_norm/'):
      return self._space_norm(name, shape)
    if blocks:
      return self._stack_blocks(name, shape, self._class_block if stage == _CLASS_STAGE else self._patch_block)
    if name.startswith('head/'):
      return self._head_parameter(name, shape)
    if name == 'embedding/space':
      return self._space_positions(name, shape)
    if name in ('embedding/time', 'time_position'):
      return self._time_positions(name, shape)
    if name == 'frame_tokens':
      return self._frame_tokens(name, shape)
    if name not in self.source.arrays:
      return self._absent(name, shape)
    return self._loaded(name, shape, name)

  def _is_new(self, name: str) -> bool:
    """Returns whether a parameter is behind the encoder of a source that is an encoder only."""
    return is_encoder(self.source, self.config) and name.split('/')[0] not in (*ENCODER, 'head')

  def _init_new(self, key: jax.Array) -> Params:
    """Initializes the parameters behind the encoder; of the others, XLA computes nothing."""
    return {name: part for name, part in self.model.init(key).items() if name not in ENCODER}

  def _loaded(self, name: str, shape: tuple[int, ...], source_name: str) -> np.ndarray:
    self._add_row('loaded', name, shape, self._source_names(source_name))
    return self._read(source_name, shape)

  def _space_norm(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the norm of a space encoder: the source's last one, which may be that before its attention pool."""
    norm = name.removeprefix('space_')
    candidates = (name, norm, f'class_blocks/0/class_attention/{norm}')
    source_name = next((candidate for candidate in candidates if candidate in self.source.arrays), None)
    return self._absent(name, shape) if source_name is None else self._loaded(name, shape, source_name)

  def _stack_blocks(
    self, name: str, shape: tuple[int, ...], source_block: Callable[[str, int], tuple[str, bool]]
  ) -> np.ndarray:
    """Returns a stage's parameter: the stacked arrays of its blocks."""
    stacked = np.empty(shape, np.float32)
    blocks = [source_block(name, i) for i in range(shape[0])]
    for i, (source_name, _) in enumerate(blocks):
      stacked[i] = self._read(source_name, shape[1:])
    status = 'copied' if any(is_copy for _, is_copy in blocks) else 'loaded'
    self._add_row(status, name, shape, self._source_names(blocks[0][0], blocks[-1][0]))
    return stacked

  def _patch_block(self, name: str, i: int) -> tuple[str, bool]:
    """Returns the source name of block i of the space or motion stage, and that it is not a second copy."""
    stage, _, rest = name.partition('/blocks/')
    return f'blocks/{i + (self.config.space_blocks if stage == "motion" else 0)}/{rest}', False

  def _class_block(self, name: str, i: int) -> tuple[str, bool]:
    """Returns the source name of class block i: a class block, else the next block, else a copy of the last one."""
    rest, count = name.partition('/blocks/')[2], 0
    while f'class_blocks/{count}/{rest}' in self.source.arrays:
      count += 1
    if count:
      return f'class_blocks/{min(i, count - 1)}/{rest}', i >= count
    last, index = self.source.info.depth - 1, self.config.space_blocks + self.config.motion_blocks + i
    return f'blocks/{min(index, last)}/{rest.replace("class_attention", "space_attention")}', index > last

  def _head_parameter(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if self._head is None:
      self._add_row('fresh', name, shape, f'zeros: {self._head_note}')
      return np.zeros(shape, np.float32)
    self._add_row('loaded', name, shape, self._source_names(name) + self._head_note)
    return self._read(name, (*shape[:-1], self.source.info.classes))[..., self._head]

  def _absent(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a parameter that the source lacks: norms start with scale 1 and bias 0, tokens and positions at 0.

    The class token starts as the first frame token, if the source has frame tokens instead.
    """
    if name == 'class_token' and 'frame_tokens' in self.source.arrays:
      self._add_row('copied', name, shape, 'the first of frame_tokens')
      return self._read('frame_tokens', (self.source.info.tokens, *shape))[0]
    one = name in ('norm/scale', 'pre_norm/scale', 'space_norm/scale')
    self._add_row('fresh', name, shape, f'{"ones" if one else "zeros"}: {_ABSENT.get(name, "the source has none")}')
    return np.full(shape, one, np.float32)

  def _frame_tokens(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the frame tokens: those of the source, else its class token (with its position) and its registers."""
    if name in self.source.arrays:
      self._add_row('loaded', name, shape, self._source_names(name))
      return self._read(name, shape)
    width, registers = shape[1:], shape[0] - self.source.info.has_class_token
    parts, names = [], []
    if self.source.info.has_class_token:
      token = self._read('class_token', width)
      if 'class_position' in self.source.arrays:
        token = token + self._read('class_position', width)
      parts.append(token[None])
      names.append(self._source_names('class_token'))
    if registers:
      parts.append(self._read('registers', (registers, *width)))
      names.append(self._source_names('registers'))
    self._add_row('loaded', name, shape, ' '.join(names))
    return np.concatenate(parts)

  def _space_positions(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    info, grid = self.source.info, self.config.grid
    if name not in self.source.arrays:
      self._add_row('fresh', name, shape, 'zeros: the source has rotary positions')
      return np.zeros(shape, np.float32)
    positions = self._read(name, (info.grid[0] * info.grid[1], shape[-1])).reshape(*info.grid, -1)  # rows columns d
    method = 'bicubic, antialiased' if info.antialias else 'bicubic, not antialiased'
    same = info.grid == grid
    note = '' if same else f' ({_format_size(info.grid)} to {_format_size(grid)}, {method})'
    self._add_row('loaded' if same else 'resized', name, shape, self._source_names(name) + note)
    return resize_space(positions, grid, antialias=info.antialias)

  def _time_positions(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    frames = self.source.info.frames
    if not frames:
      self._add_row('fresh', name, shape, 'zeros: the source is an image model')
      return np.zeros(shape, np.float32)
    same = frames == shape[0]
    note = '' if same else f' ({frames} to {shape[0]} frames, linear)'
    self._add_row('loaded' if same else 'resized', name, shape, self._source_names(name) + note)
    return resize_time(self._read(name, (frames, shape[-1])), shape[0])

  def _assign_motion(self, params: Params, key: jax.Array) -> None:
    """Assigns motion attention: from the source where a block has it, else initialized as `model.motion_init` says."""
    config = self.config
    blocks = [f'blocks/{config.space_blocks + i}/motion_attention' for i in range(config.motion_blocks)]
    available = [f'{block}/norm/scale' in self.source.arrays for block in blocks]
    initial = {} if all(available) else self._init_motion(params, key)
    for name, shape in parameter_shapes(self.model.abstract).items():
      rest = name.partition('/motion_attention/')[2]
      if not rest:
        continue
      array = np.array(get_by_name(initial, rest)) if initial else np.empty(shape, np.float32)
      for i, block in enumerate(blocks):
        if available[i]:
          array[i] = self._read(f'{block}/{rest}', shape[1:])
      set_by_name(params, name, array)
      self._add_motion_row(name, shape, [f'{block}/{rest}' for block in blocks], available)

  def _init_motion(self, params: Params, key: jax.Array) -> Params:
    """Returns motion attention as `model.motion_init` says."""
    blocks = params['motion']['blocks']
    if self.config.motion_init == 'random':
      return jax.jit(lambda key: self.model.init(key)['motion']['blocks']['motion_attention'])(key)
    initial = init_motion({'motion': {'blocks': blocks}}, self.config)
    return initial['motion']['blocks']['motion_attention']

  def _add_motion_row(self, name: str, shape: tuple[int, ...], source_names: list[str], available: list[bool]) -> None:
    if all(available):
      self._add_row('loaded', name, shape, self._source_names(source_names[0], source_names[-1]))
      return
    init = self.config.motion_init
    status, note = ('fresh', 'random') if init == 'random' else ('copied', _COPIED[init])
    loaded = [i for i, is_available in enumerate(available) if is_available]
    suffix = f'; blocks {", ".join(map(str, loaded))} are loaded' if loaded else ''
    self._add_row(status, name, shape, note + suffix)

  def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of the source as float32; it must have this shape and finite values."""
    array = np.asarray(self.source.arrays[name], np.float32)
    self._used.add(name)
    if array.shape != tuple(shape):
      raise UserError(
        f'{self._source_names(name)} gives {name} the shape {array.shape} instead of {tuple(shape)}: '
        'the tensor belongs to a model of a different size'
      )
    if not np.isfinite(array).all():
      raise UserError(f'{self._source_names(name)} has values that are not finite: the source is damaged')
    return array

  def _source_names(self, first: str, last: str | None = None) -> str:
    """Returns the source's names of a parameter, or of one in consecutive blocks: 'blocks.{4-10}.norm1.weight'."""
    names = ' '.join(self.source.origin[first])
    if last is None or last == first:
      return names
    start, end = (name.split('/')[1] for name in (first, last))
    return re.sub(rf'(?<!\d){start}(?!\d)', f'{{{start}-{end}}}', names, count=len(self.source.origin[first]))

  def _add_row(self, status: str, name: str, shape: tuple[int, ...], note: str) -> None:
    self.rows.append(Row(status, name, shape, note))

  def _unused_rows(self) -> Iterator[Row]:
    """Yields a row for each tensor of the source that was not used."""
    for tensor, reason in self.source.unused.items():
      yield Row('unused', tensor, (), reason)
    listed = {tensor for name in self._used for tensor in self.source.origin[name]}
    for name, tensors in self.source.origin.items():
      for tensor in tensors:
        if tensor not in listed:
          listed.add(tensor)
          yield Row('unused', tensor, (), self._unused_reason(name))

  def _unused_reason(self, name: str) -> str:
    if name.startswith('head/'):
      return self._head_note
    if name in ('registers', 'frame_tokens', 'class_token', 'class_position'):
      return f'model.frame_tokens={self.source.info.tokens} keeps the class token and registers of every frame'
    if name.startswith('norm/'):
      return 'the norm before an attention pool'
    block, motion, _ = name.partition('/motion_attention/')
    if motion and f'{block}/mlp/norm/scale' in self._used:
      return 'this block of the model has no motion attention'
    return 'the model has fewer blocks'


def is_encoder(source: Source, config: MEViTConfig) -> bool:
  """Returns whether a source is used as an encoder only: all that is behind it is initialized, not loaded."""
  return config.space_encoder and 'space_norm/scale' not in source.arrays


def check_sizes(source: Source, config: MEViTConfig) -> None:
  """Raises a UserError if the source's sizes differ from the model's."""
  info = source.info
  problems = [
    f'{name} {_format_value(getattr(info, name))} -> {_format_value(getattr(config, name))} (config.model.{name})'
    for name in ('width', 'heads', 'mlp_dim', 'patch_size')
    if getattr(info, name) not in (None, getattr(config, name))
  ]
  if config.frame_tokens not in (0, info.tokens):
    problems.append(
      f'{info.tokens} tokens per frame (class token and registers) -> {config.frame_tokens} '
      f'(config.model.frame_tokens; use {info.tokens}, or 0 for none)'
    )
  if config.class_blocks == 0 and not info.has_class_token:
    problems.append('no class token -> no class blocks (use config.model.class_blocks=1)')
  if is_encoder(source, config) and info.frames:
    problems.append('a video model -> an encoder of single frames (use config.model.space_encoder=False)')
  if 'space_norm/scale' in source.arrays and not config.space_encoder:
    problems.append('an encoder of single frames -> none (use config.model.space_encoder=True)')
  depth = config.space_blocks + (0 if is_encoder(source, config) else config.motion_blocks)
  if depth > info.depth:
    problems.append(
      f'{info.depth} blocks -> {depth} (config.model.space_blocks {config.space_blocks} + '
      f'config.model.motion_blocks {config.motion_blocks})'
    )
  if problems:
    raise UserError(f'{info.kind} has a different size from the model (source -> model): {"; ".join(problems)}')


def format_table(rows: Sequence[Row]) -> str:
  """Formats the rows as lines; unused names that differ only in their block number share a line."""
  lines, counts, first = [], dict[tuple[str, str], int](), dict[tuple[str, str], Row]()
  for row in rows:
    if row.status == 'unused':
      group = re.sub(r'\d+', '', row.name), row.note
      counts[group] = counts.get(group, 0) + 1
      first.setdefault(group, row)
    else:
      lines.append((row.status, row.name, ' '.join(map(str, row.shape)), row.note))
  for group, row in first.items():
    more = f' and {counts[group] - 1} more' if counts[group] > 1 else ''
    lines.append((row.status, row.name + more, '', row.note))
  widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:3]]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(line, [*widths, 0], strict=True)) for line in lines)


def _format_size(sides: Sequence[int]) -> str:
  return 'x'.join(map(str, sides))


def _format_value(value: object) -> str:
  return _format_size(value) if isinstance(value, tuple) else str(value)
