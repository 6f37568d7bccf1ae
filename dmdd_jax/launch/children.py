"""Processes that this one starts, a few at a time; SIGTERM is passed on.

Synopsis:

  starts = {'first': lambda: subprocess.Popen(['first'])}
  statuses = children.run(starts, at_a_time=2)
"""

import collections
from collections.abc import Callable, Iterable, Mapping
import signal
import subprocess
import time

from absl import logging

from dmdd_jax.launch import preemption

_POLL_SECONDS = 0.1


def run(
  starts: Mapping[str, Callable[[], subprocess.Popen]], at_a_time: int
) -> dict[str, int]:
  """Runs all processes, in order, and waits for them.

  SIGTERM to this process is passed on to those that run, and no other is
  started; so it is when this function is left by an exception.

  Args:
    starts: each starts a process; by the names that the log calls them.
    at_a_time: how many run at once, at least one.

  Returns:
    The exit status of each; `preemption.STATUS` for one that SIGTERM ended or
    kept from being started.
  """
  statuses = dict.fromkeys(starts, preemption.STATUS)
  waiting = collections.deque(starts)
  running: dict[str, subprocess.Popen] = {}
  told = False
  with preemption.watched():
    try:
      while waiting or running:
        if preemption.received() and not told:
          told = True
          waiting.clear()
          _terminate(running.values())
        while waiting and len(running) < at_a_time:
          name = waiting.popleft()
          running[name] = starts[name]()
        for name, process in tuple(running.items()):
          if process.poll() is not None:
            del running[name]
            if process.returncode != -signal.SIGTERM:
              statuses[name] = process.returncode
            logging.info('%s: exit status %d', name, process.returncode)
        time.sleep(_POLL_SECONDS)
    finally:
      _terminate(running.values())
      for process in running.values():
        process.wait()
  return statuses


def _terminate(processes: Iterable[subprocess.Popen]) -> None:
  for process in processes:
    process.terminate()
