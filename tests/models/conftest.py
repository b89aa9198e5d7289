"""What the tests of the model share."""

import pytest


@pytest.fixture(scope='module', autouse=True)
def always(exact_and_fast):
  """Exact and fast."""
