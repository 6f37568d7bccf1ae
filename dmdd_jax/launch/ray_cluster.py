"""Children for `children.run` that run on the machines of a Ray cluster.

Needs the extra `ray`. Every machine must have this package and Python under the
same paths, and see the same folders.

Experimental: run on a Ray cluster of one machine without GPUs. Never run:
several machines, and GPUs.

Synopsis:

  launch = ray_cluster.connect('auto', cpus=8, gpus=1)
  process = launch(['python', '-m', 'dmdd_jax.main'], '/shared/run/main.log')
  process.wait()
"""

from collections.abc import Callable, Sequence
import os
import subprocess
import time

from absl import logging

from dmdd_jax.launch import preemption

_POLL_SECONDS = 0.2


class _Child:
  """An actor: holds its share of a machine while its process runs."""

  def __init__(self, command: Sequence[str], log: str, folder: str):
    with open(log, 'a') as file:
      self._process = subprocess.Popen(
        command, stdout=file, stderr=file, cwd=folder
      )

  def poll(self) -> int | None:
    return self._process.poll()

  def terminate(self) -> None:
    self._process.terminate()


class Process:
  """A process on a machine of the cluster, or one that waits for a machine.

  Attributes:
    returncode: exit status, None until the process has ended; 1 if its machine
      was lost, `preemption.STATUS` if it was terminated before it began.
  """

  def __init__(self, command: Sequence[str], log: str, cpus: int, gpus: int):
    import ray

    self._ray, self.returncode, self._begun = ray, None, False
    actor = ray.remote(_Child).options(num_cpus=cpus, num_gpus=gpus)
    self._child = actor.remote(list(command), os.path.abspath(log), os.getcwd())
    self._answer = self._child.poll.remote()

  def poll(self) -> int | None:
    """The exit status, or None."""
    if self.returncode is None and self._ray.wait([self._answer], timeout=0)[0]:
      try:
        self.returncode = self._ray.get(self._answer)
      except self._ray.exceptions.RayError as error:
        logging.error('%s', error)
        self.returncode = 1
      self._begun = True
      if self.returncode is None:
        self._answer = self._child.poll.remote()
      else:
        self._ray.kill(self._child)
    return self.returncode

  def terminate(self) -> None:
    """Sends SIGTERM; a process that still waits is never begun."""
    if self._begun:
      self._child.terminate.remote()
    elif self.returncode is None:
      self._ray.kill(self._child)
      self.returncode = preemption.STATUS

  def wait(self) -> int:
    """Waits for the end of the process and returns its exit status."""
    while self.poll() is None:
      time.sleep(_POLL_SECONDS)
    return self.returncode


def connect(
  address: str, cpus: int = 1, gpus: int = 0
) -> Callable[[Sequence[str], str], Process]:
  """Joins a cluster.

  Args:
    address: HOST:PORT of the cluster's head; 'auto' is the cluster that this
      machine is part of; 'local' is a new cluster of this machine alone, which
      ends with this program.
    cpus: cores of each process; Ray counts them and does not enforce them.
    gpus: GPUs of each process, which sees no others.

  Returns:
    A function of a command and its log file that starts a process.

  Raises:
    ValueError: Ray is not installed, there is no cluster, or no machine has
      that many cores and GPUs.
  """
  try:
    import ray
  except ImportError as error:
    raise ValueError(
      "Ray is not installed: pip install -c constraints.txt -e '.[ray]'"
    ) from error
  try:
    ray.init(address=address, log_to_driver=False, logging_level='WARNING')
  except ConnectionError as error:
    raise ValueError(f'no Ray cluster at {address!r}: {error}') from error
  machines = [node['Resources'] for node in ray.nodes() if node['Alive']]
  if not any(
    node.get('CPU', 0) >= cpus and node.get('GPU', 0) >= gpus
    for node in machines
  ):
    raise ValueError(
      f'no machine of the Ray cluster has {cpus} CPUs and {gpus} GPUs:'
      f' {machines}'
    )
  return lambda command, log: Process(command, log, cpus, gpus)
