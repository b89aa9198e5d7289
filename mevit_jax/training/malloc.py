"""Memory allocation on CPUs: glibc returns the memory of a step to the system after every step."""

import ctypes

import jax

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # from malloc.h


def configure_malloc() -> None:
  """Makes glibc reuse the memory of a step for the next one, on CPUs.

  XLA allocates temporaries anew at every step. Each page of fresh memory costs a page fault: at least a tenth of a
  training step for B/16. Call this before JAX initializes its devices; later it has no effect. Dispatch is synchronous,
  so that the main thread allocates everything: the arenas of other threads are too small for these arrays.
  """
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  libc = ctypes.CDLL(None)
  if jax.default_backend() == 'cpu' and hasattr(libc, 'mallopt'):
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_MMAP_MAX, 0)
