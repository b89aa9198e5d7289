"""A disk that is full: what this process writes to a file beyond a limit fails."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
  """Lets writing fail (EFBIG) at a number of bytes per file, as a full disk does (ENOSPC); pipes are not affected."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
