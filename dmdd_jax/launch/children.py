"""Child processes, a few at a time; SIGTERM and Ctrl-C are passed on to them.

Synopsis:

  starts = {'first': lambda: subprocess.Popen(['first'])}
  outcome = children.run(starts, at_a_time=2)
  print(outcome.finished, outcome.failed, outcome.preempted)
"""

import collections
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import signal
import time
from typing import Any

from absl import logging

from dmdd_jax import cli
from dmdd_jax.launch import preemption

_POLL_SECONDS = 0.1
# Saved and left; `cli.run` after Ctrl-C; killed by one of the two signals.
_PREEMPTED = (
  preemption.STATUS,
  cli.INTERRUPTED,
  -signal.SIGTERM,
  -signal.SIGINT,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How the children ended: each of their names stands in one of the lists.

  Attributes:
    finished: names of the children with exit status 0.
    failed: names of those with any other status, but for `preempted`.
    preempted: names of those that SIGTERM or Ctrl-C ended (an exit status of
      `_PREEMPTED`) or kept from being started.
  """

  finished: list[str]
  failed: list[str]
  preempted: list[str]


def run(starts: Mapping[str, Callable[[], Any]], at_a_time: int) -> Outcome:
  """Runs all children, in order, and waits for them.

  SIGTERM to this process, or Ctrl-C, is passed on to the running children as
  SIGTERM, and no other child is started. The same happens where this function
  ends by an exception.

  Args:
    starts: {name: function that starts a child}; the log prints the name. A
      child has `poll`, `terminate`, `wait` and `returncode`, as
      `subprocess.Popen` and `ray_cluster.Process` have.
    at_a_time: number of children that run at once, at least one.

  Returns:
    The names in three lists, each in the order of `starts`.
  """
  statuses = dict.fromkeys(starts, preemption.STATUS)
  waiting = collections.deque(starts)
  running: dict[str, Any] = {}
  terminated = False
  with preemption.watched(interrupts=True):
    try:
      while waiting or running:
        if preemption.received() and not terminated:
          terminated = True
          waiting.clear()
          _terminate(running.values())
        while waiting and len(running) < at_a_time:
          name = waiting.popleft()
          running[name] = starts[name]()
        for name, child in tuple(running.items()):
          if child.poll() is not None:
            del running[name]
            statuses[name] = child.returncode
            logging.info('%s: exit status %d', name, child.returncode)
        time.sleep(_POLL_SECONDS)
    finally:
      _terminate(running.values())
      for child in running.values():
        child.wait()
  return _outcome(statuses)


def _outcome(statuses: Mapping[str, int]) -> Outcome:
  """Reads the exit statuses."""
  outcome = Outcome([], [], [])
  for name, status in statuses.items():
    if status == 0:
      outcome.finished.append(name)
    elif status in _PREEMPTED:
      outcome.preempted.append(name)
    else:
      outcome.failed.append(name)
  return outcome


def _terminate(children: Iterable[Any]) -> None:
  for child in children:
    child.terminate()
