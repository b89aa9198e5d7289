"""docs/configuration.md lists every field with its current default."""

import dataclasses

from docs import fields
from mevit_jax.config.experiment import Config


def test_the_page_has_every_field_with_its_default():
  page = fields.PAGE.read_text()
  for group in (Config(), *(value for value in vars(Config()).values() if dataclasses.is_dataclass(value))):
    for name, value in vars(group).items():
      if not dataclasses.is_dataclass(value):
        path = f'{group.group}.{name}' if group.group else name
        assert f'| `{path}` | `{value!r}` |' in page, f'{path}: python -m docs.fields'


def test_every_field_is_described():
  """A row's description starts with text, for every field of every group."""
  rows = [line for line in fields.make_tables().splitlines() if line.startswith('| `')]
  assert len(rows) > 80
  assert all(row.rsplit('| ', 1)[1].strip(' |') for row in rows)
