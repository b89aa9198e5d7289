"""Compiled programs that a workdir keeps: a run that goes on does not compile again."""

from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def enable_compilation_cache(workdir: Path) -> None:
  """Keeps in `WORKDIR/compiled` what takes a second and more to compile, and takes it from there.

  Not for CPUs, whose programs are of the very machine and compile in seconds; and not where JAX was told of another
  folder (JAX_COMPILATION_CACHE_DIR). A file there that is damaged is compiled again, with a warning.
  """
  config: Any = jax.config  # which does not say what it has
  if jax.default_backend() != 'cpu' and not config.jax_compilation_cache_dir:
    compilation_cache.set_cache_dir(str(workdir / 'compiled'))
    compilation_cache.reset_cache()  # JAX asks once whether there is one, and something was compiled before
