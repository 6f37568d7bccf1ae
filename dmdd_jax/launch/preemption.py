"""SIGTERM, the notice before a machine is taken away.

While a run is watched, the signal is only noted; the training asks after each
step, saves, and leaves with `Preempted`. Of several processes it is enough that
one is told: all ask together, and get the same answer.

Synopsis:

  with preemption.watched():
    ...
    if preemption.anywhere():
      preemption.leave('saved step 12 in runs/demo/surface/checkpoints')
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import signal
import threading
from typing import NoReturn

from absl import logging
import jax
import numpy as np

from dmdd_jax import sharding

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
STATUS = 75

_noted = threading.Event()


class Preempted(SystemExit):
  """Everything is saved; ends the process with exit status `STATUS`."""


def received() -> bool:
  """Whether SIGTERM came while this process was watched."""
  return _noted.is_set()


def anywhere() -> jax.Array | np.bool_:
  """Whether SIGTERM came to any of all processes, which must all ask at once.

  Returns:
    A truth value, the same in all processes. Of several, an array that is on
    its way: taking its truth waits for it, and for the step before it.
  """
  if jax.process_count() == 1:
    return np.bool_(received())
  mesh = sharding.make_mesh()
  mine = np.full(jax.local_device_count(), received())
  return _any(mesh)(sharding.to_global(mesh, {'told': mine})['told'])


@functools.cache
def _any(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(
    lambda told: told.any(), out_shardings=sharding.replicated(mesh)
  )


def leave(done: str) -> NoReturn:
  """Says what was done and how to go on, and raises `Preempted`."""
  message = 'SIGTERM: %s; the same command goes on (exit status %d)'
  logging.warning(message, done, STATUS)
  raise Preempted(STATUS)


def _note(signum: int, frame: object) -> None:
  del signum, frame
  _noted.set()
  logging.warning('SIGTERM: a checkpoint is saved after the current step')


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Notes SIGTERM instead of dying of it; watching again inside is the same.

  Only a main thread can set a handler; in another nothing is watched.
  """
  main = threading.current_thread() is threading.main_thread()
  before = signal.getsignal(signal.SIGTERM)
  if not main or before is _note:
    yield
    return
  _noted.clear()
  signal.signal(signal.SIGTERM, _note)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
