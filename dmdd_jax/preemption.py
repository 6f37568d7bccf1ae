"""SIGTERM, the notice before a machine is taken away.

While a run is watched, the signal is only noted; the training asks after each
step, saves, and leaves with `Preempted`.

Synopsis:

  with preemption.watched():
    ...
    if preemption.received():
      preemption.leave('saved step 12 in runs/demo/surface/checkpoints')
"""

from collections.abc import Iterator
import contextlib
import signal
import threading
from typing import NoReturn

from absl import logging
import jax

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
STATUS = 75

_noted = threading.Event()


class Preempted(SystemExit):
  """Everything is saved; ends the process with exit status `STATUS`."""


def received() -> bool:
  """Whether SIGTERM came while this process was watched."""
  return _noted.is_set()


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

  Where `jax.distributed` is initialised, its own service watches the signal,
  for all processes together; and only a main thread can set a handler.
  """
  main = threading.current_thread() is threading.main_thread()
  before = signal.getsignal(signal.SIGTERM)
  if jax.distributed.is_initialized() or not main or before is _note:
    yield
    return
  _noted.clear()
  signal.signal(signal.SIGTERM, _note)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
