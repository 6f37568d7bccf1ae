"""SIGTERM, the notice before a machine is taken away, and Ctrl-C.

While a run is watched, the handler only notes the signal. The training asks
after each step, saves, and leaves with `Preempted`. If one of several processes
gets the signal, all of them leave: they ask together and get the same answer.

Ctrl-C (SIGINT) is noted only where the program asks often, so that it ends
within seconds. Anywhere else it ends the program as usual, see `cli.run`, and
so does the second one.

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
import time
from typing import NoReturn

from absl import logging
import jax
import numpy as np

from dmdd_jax import sharding

# EX_TEMPFAIL of sysexits.h: no failure, run the same command again.
STATUS = 75

_NAMES = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C'}
_POLL_SECONDS = 0.1

# The signals noted. A handler may interrupt another one, so nothing is locked.
_noted: list[int] = []


class Preempted(SystemExit):
  """Everything is saved; ends the process with exit status `STATUS`."""


def received() -> bool:
  """Whether a signal came while this process was watched."""
  return bool(_noted)


def sleep(seconds: float) -> None:
  """Sleeps, but no longer than until a signal comes."""
  end = time.monotonic() + seconds
  while not received() and (rest := end - time.monotonic()) > 0:
    time.sleep(min(_POLL_SECONDS, rest))


def anywhere() -> jax.Array | np.bool_:
  """Whether a signal came to any of the processes; all must ask together.

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
  message = '%s: %s; the same command continues (exit status %d)'
  # Another process may be the one that got the signal.
  name = _NAMES[_noted[0]] if _noted else 'SIGTERM'
  logging.warning(message, name, done, STATUS)
  raise Preempted(STATUS)


def _note(signum: int, frame: object) -> None:
  del frame
  _noted.append(signum)
  hint = ''
  if signum == signal.SIGINT:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hint = '; once more ends it at once'
  logging.warning('%s: ending after the work at hand%s', _NAMES[signum], hint)


@contextlib.contextmanager
def watched(interrupts: bool = False) -> Iterator[None]:
  """Notes SIGTERM instead of ending the process; may be nested.

  Only the main thread can set a handler; in another thread this does nothing.

  Args:
    interrupts: whether to note Ctrl-C too. What runs inside must ask often.
  """
  with contextlib.ExitStack() as stack:
    if threading.current_thread() is threading.main_thread():
      if signal.getsignal(signal.SIGTERM) is not _note:
        _noted.clear()
        _handle(stack, signal.SIGTERM)
      if interrupts and not received():
        _handle(stack, signal.SIGINT)
    yield


def _handle(stack: contextlib.ExitStack, signum: signal.Signals) -> None:
  """Handles a signal by `_note` until the stack is closed."""
  stack.callback(signal.signal, signum, signal.getsignal(signum))
  signal.signal(signum, _note)
