"""Writes the tables of docs/configuration.md from the config dataclasses and their docstrings.

python -m docs.fields
"""

import dataclasses
import inspect
import re
import typing
from pathlib import Path

from mevit_jax.config.experiment import Config
from mevit_jax.files import write_text

PAGE = Path(__file__).with_name('configuration.md')
START = '<!-- Tables below: python -m docs.fields -->\n'


def describe_fields(cls: type) -> dict[str, str]:
  """Returns the descriptions of a dataclass's fields: the Attributes section of its docstring."""
  section = inspect.cleandoc(cls.__doc__ or '').partition('Attributes:\n')[2].partition('\n\n')[0]
  entries = re.findall(r'^  (\w+): (.*(?:\n    .*)*)', section, re.MULTILINE)
  return {name: ' '.join(text.split()) for name, text in entries}


def make_tables() -> str:
  """Returns a section with a table for every config group."""
  groups = {'': Config, **{name: kind for name, kind in typing.get_type_hints(Config).items() if is_group(kind)}}
  return '\n'.join(
    f'## {f"`{name}`" if name else "Top level"}\n\n{make_table(kind, name)}' for name, kind in groups.items()
  )


def is_group(kind: object) -> bool:
  """Returns True for config dataclasses."""
  return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def make_table(cls: type, group: str) -> str:
  """Returns the table of a group: field, default, description."""
  descriptions = describe_fields(cls)
  lines = ['| field | default | |', '|---|---|---|']
  for field in dataclasses.fields(cls):
    if not is_group(type(field.default)):
      name = f'{group}.{field.name}' if group else field.name
      description = descriptions[field.name].replace('|', '\\|')
      lines.append(f'| `{name}` | `{field.default!r}` | {description} |')
  return '\n'.join(lines) + '\n'


def main() -> None:
  """Rewrites the tables of the page."""
  text = PAGE.read_text().partition(START)[0]
  write_text(PAGE, f'{text}{START}\n{make_tables()}')


if __name__ == '__main__':
  main()
