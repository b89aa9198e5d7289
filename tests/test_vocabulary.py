"""Vocabulary: names and phrases that were replaced do not return."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Regular expressions of the replaced names, and of phrases that are not plain English.
REPLACED = r"""
running mean | recipe | max_dead
by_rows | keep_rows | host_rows | as_it_is | each_device | is_first\b | failure_told
open_saved | keep_memory | keep_programs | Stop\.asked | Watch\.settle | _AHEAD\b
Landing | in_a_row | tasks\.supervise | \bblame\b | \breceipts?\b | \btorn\b
make_looks | evaluation\.looks | motion_start | model\.order\b | data\.balance | data\.repeats
FASTEST | \bASKED\b | benchmarks[./](turns|peers|kills)
(?<!there )\bis no [a-z] | told apart | what is there | goes on\b | of another run\b
The house | Out again | Small and uneven
"""


def find_replaced(text):
  """Returns the replaced names and phrases in a text."""
  pattern = '|'.join(part.strip() for line in REPLACED.strip().splitlines() for part in re.split(r' \| ', line))
  return [match[0] for match in re.finditer(pattern, text)]


def test_replaced_names_and_phrases_do_not_return():
  listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=False)
  if listed.returncode:
    pytest.skip('not a git checkout')
  files = [ROOT / name for name in listed.stdout.splitlines() if name.endswith(('.py', '.md', '.sh', '.html', '.toml'))]
  files = [file for file in files if file.is_file() and file.name not in ('CHANGELOG.md', 'test_vocabulary.py')]
  found = {str(file.relative_to(ROOT)): words for file in files if (words := find_replaced(file.read_text()))}
  assert not found
  assert find_replaced('a running mean, Stop.asked and benchmarks/turns') == [
    'running mean',
    'Stop.asked',
    'benchmarks/turns',
  ]
