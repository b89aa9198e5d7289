"""Settings of the model's tests."""

import pytest


@pytest.fixture(scope='module', autouse=True)
def always(exact_and_fast):
  """Applies `exact_and_fast` to every test."""
