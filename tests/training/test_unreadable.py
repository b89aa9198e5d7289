"""Videos that are unreadable while training: counted, named once, and an end to it."""

import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.training.unreadable import Unreadable


def batch(*errors):
  return {'error': np.array(errors)}


def test_counts_clips_and_names_videos_once(capsys):
  unreadable = Unreadable()
  unreadable.look(batch('', 'a: empty', '', 'b: torn\na: empty'))
  unreadable.look(batch('a: empty', '', '', ''))
  assert unreadable.take() == 3
  assert unreadable.take() == 0
  unreadable.look(batch('', 'c: torn', '', 'b: torn'))
  assert unreadable.take() == 2
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition('taken: ')[2] for line in lines] == ['a: empty', 'b: torn', 'c: torn']


def test_one_in_ten_is_borne_and_no_more():
  unreadable = Unreadable()
  for _ in range(300):
    unreadable.look(batch('a: empty', *[''] * 9))
  with pytest.raises(UserError, match=r'101 of the last 1,000 clips were of unreadable videos'):
    unreadable.look(batch('', 'a: empty', 'a: empty'))


def test_what_is_wholly_damaged_ends_soon():
  unreadable = Unreadable()
  unreadable.look(batch(*['a: empty'] * 100))
  with pytest.raises(UserError, match=r'104 of the last 104 clips'):
    unreadable.look(batch(*['b: empty'] * 4))
