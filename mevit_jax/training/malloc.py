"""The memory of a step on CPUs, which glibc would give back to the system after every step."""

import ctypes

import jax

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def configure_malloc() -> None:
  """Keeps what a step has taken for the next one, where CPUs compute and glibc allocates.

  XLA takes a step's temporaries anew at every step. From fresh memory each page of them costs a fault, which for B/16
  is a tenth of a training step and more. To be called before JAX is asked for its devices; too late it changes nothing.
  One thread must allocate them all, the main one: the others' arenas have no room for arrays of this size.
  """
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  libc = ctypes.CDLL(None)
  if jax.default_backend() == 'cpu' and hasattr(libc, 'mallopt'):
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_MMAP_MAX, 0)
