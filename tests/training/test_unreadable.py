"""Unreadable videos during training: counted, logged once, and an error if too many."""

import numpy as np
import pytest

from mevit_jax.errors import UserError
from mevit_jax.training.unreadable import UnreadableMonitor


def batch(*errors):
  return {'error': np.array(errors)}


def test_counts_clips_and_logs_videos_once(caplog):
  unreadable = UnreadableMonitor()
  assert unreadable.add(batch('', 'a: empty', '', 'b: truncated\na: empty')) == 2
  assert unreadable.add(batch('a: empty', '', '', '')) == 1
  assert unreadable.add(batch('', '', '', '')) == 0
  assert unreadable.add(batch('', 'c: truncated', '', 'b: truncated')) == 2
  logged = [message.partition('another one: ')[2] for message in caplog.messages]
  assert logged == [
    'a: empty',
    'b: truncated',
    'c: truncated',
  ]


def test_one_in_ten_is_the_limit():
  unreadable = UnreadableMonitor()
  for _ in range(300):
    unreadable.add(batch('a: empty', *[''] * 9))
  with pytest.raises(UserError, match=r'101 of the last 1,000 clips were unreadable'):
    unreadable.add(batch('', 'a: empty', 'a: empty'))


def test_a_damaged_dataset_ends_training_early():
  unreadable = UnreadableMonitor()
  unreadable.add(batch(*['a: empty'] * 100))
  with pytest.raises(UserError, match=r'104 of the last 104 clips'):
    unreadable.add(batch(*['b: empty'] * 4))
