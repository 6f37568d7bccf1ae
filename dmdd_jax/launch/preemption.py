"""SIGTERM, the notice before a machine is taken away.

While a run is watched, the handler only notes the signal. The training asks
after each step, saves, and leaves with `Preempted`. If one of several processes
gets the signal, all of them leave: they ask together and get the same answer.

Experimental: signals were sent by hand and by tests on one machine. Never run:
the preemption notice of a TPU or of a cloud machine.

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

# EX_TEMPFAIL of sysexits.h: no failure, run the same command again.
STATUS = 75

_noted = threading.Event()


class Preempted(SystemExit):
  """Everything is saved; ends the process with exit status `STATUS`."""


def received() -> bool:
  """Whether SIGTERM came while this process was watched."""
  return _noted.is_set()


def anywhere() -> jax.Array | np.bool_:
  """Whether SIGTERM came to any of the processes; all must ask together.

  Returns:
    A truth value, the same in all processes. With several processes it is an
    array that is still being computed: `bool` waits for it, and for the step
    before it.
  """
  if jax.process_count() == 1:
    return np.bool_(received())
  mesh = sharding.make_mesh()
  mine = np.full(jax.local_device_count(), received())
  return _any(mesh)(sharding.to_global(mesh, {'received': mine})['received'])


@functools.cache
def _any(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(
    lambda received: received.any(), out_shardings=sharding.replicated(mesh)
  )


def leave(done: str) -> NoReturn:
  """Logs what was done and how to continue, and raises `Preempted`."""
  message = 'SIGTERM: %s; the same command continues (exit status %d)'
  logging.warning(message, done, STATUS)
  raise Preempted(STATUS)


def _note(signum: int, frame: object) -> None:
  del signum, frame
  _noted.set()
  logging.warning('SIGTERM: a checkpoint is saved after the current step')


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Notes SIGTERM instead of ending the process; may be nested.

  Only the main thread can set a handler; in another thread this does nothing.
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
