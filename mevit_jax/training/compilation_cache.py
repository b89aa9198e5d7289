"""Persistent compilation cache in the workdir: a resumed run does not compile again."""

from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def enable_compilation_cache(workdir: Path) -> None:
  """Enables JAX's compilation cache in `WORKDIR/compiled`, for programs that take at least a second to compile.

  Disabled on CPUs, whose programs are specific to the machine and compile in seconds, and if another folder is set
  (JAX_COMPILATION_CACHE_DIR). A damaged file is compiled again, with a warning.
  """
  config: Any = jax.config  # its attributes are not typed
  if jax.default_backend() != 'cpu' and not config.jax_compilation_cache_dir:
    compilation_cache.set_cache_dir(str(workdir / 'compiled'))
    compilation_cache.reset_cache()  # JAX checks for a cache once, at the first compilation
