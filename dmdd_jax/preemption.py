"""SIGTERM, the notice before a machine is taken away.

While a run is watched, the signal is only noted; the training asks after each
step, saves, and leaves with `Preempted`.

Synopsis:

  with preemption.watched():
    ...
    if preemption.received():
      raise preemption.Preempted('saved; the same command goes on')
"""

from collections.abc import Iterator
import contextlib
import signal
import threading

from absl import logging
import jax

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
STATUS = 75

_noted = threading.Event()


class Preempted(SystemExit):
  """Everything is saved; ends the process with exit status `STATUS`."""

  def __init__(self, message: str):
    super().__init__(STATUS)
    self._message = message

  def __str__(self) -> str:
    return self._message


def received() -> bool:
  """Whether SIGTERM came while this process was watched."""
  return _noted.is_set()


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
  except Preempted as error:
    logging.warning('%s', error)
    raise
  finally:
    signal.signal(signal.SIGTERM, before)
