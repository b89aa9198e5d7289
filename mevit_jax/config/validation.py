"""Validation of config fields: the type annotation of a field declares its range, `Literal` declares its choices."""

import dataclasses
import math
import typing
from typing import Any, Literal

from mevit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds of a number, or of every number of a tuple: `Annotated[float, Range(0, 1, open_high=True)]` is [0, 1).

  Attributes:
    low: smallest value.
    high: largest value.
    open_low: whether `low` itself is excluded.
    open_high: whether `high` itself is excluded.
  """

  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  open_high: bool = False

  def __contains__(self, value: float) -> bool:
    above = self.low < value if self.open_low else self.low <= value
    below = value < self.high if self.open_high else value <= self.high
    return above and below

  def __str__(self) -> str:
    if self.high == math.inf:
      return f'greater than {self.low:g}' if self.open_low else f'at least {self.low:g}'
    return f'in {"(" if self.open_low else "["}{self.low:g}, {self.high:g}{")" if self.open_high else "]"}'


# Upper limits are far above any use: they turn typing errors into one clear line before memory is allocated.
POSITIVE = Range(0, 1e12, open_low=True)
NOT_NEGATIVE = Range(0, 1e12)
FRACTION = Range(0, 1)
DECAY = Range(0, 1, open_high=True)
COUNT = Range(1, 10**6)
COUNT_OR_ZERO = Range(0, 10**6)


class Validated:
  """Base of config dataclasses: checks every field against its annotation.

  Subclasses name the config group in `group`, which error messages put before the field's name.
  """

  group: typing.ClassVar[str] = ''

  def __post_init__(self) -> None:
    for field, kind in typing.get_type_hints(type(self), include_extras=True).items():
      if field != 'group':
        self._validate(field, kind)

  def path(self, field: str) -> str:
    """Full name of a field: 'training.batch_size'."""
    return f'{self.group}.{field}' if self.group else field

  def require(self, condition: bool, field: str, message: str) -> None:
    """Raises a UserError 'GROUP.FIELD MESSAGE' unless the condition holds."""
    if not condition:
      raise UserError(f'{self.path(field)} {message}')

  def _validate(self, field: str, kind: Any) -> None:
    value = getattr(self, field)
    if typing.get_origin(kind) is Literal:
      choices = typing.get_args(kind)
      self.require(value in choices, field, f'must be one of {list(choices)}, not {value!r}')
    if typing.get_origin(kind) is not typing.Annotated:
      return
    for bounds in kind.__metadata__:
      values = value if isinstance(value, tuple) else (value,)
      if isinstance(bounds, Range) and not all(item in bounds for item in values):
        raise UserError(f'{self.path(field)} must be {bounds}, not {value}')
