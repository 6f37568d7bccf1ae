"""Joins the processes of several hosts into one program.

Synopsis, before anything else asks jax for devices:

  hosts.initialize('10.0.0.1:8476', num_processes=2, process_id=0)
  hosts.initialize()  # TPU pods and SLURM say it themselves.
"""

from collections.abc import Mapping
import importlib.util
import os

from absl import logging
import jax


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Calls `jax.distributed.initialize` where there are several processes.

  Args:
    coordinator: HOST:PORT of process 0, the same in all processes; 'auto' lets
      jax find all three. With nothing given, it is asked to on a TPU host and
      in a SLURM step of several tasks; anywhere else this is one process.
    num_processes: how many there are.
    process_id: which one this is, from 0.

  Raises:
    ValueError: only some of the three are given, or the processes did not
      find each other.
  """
  given = (coordinator, num_processes, process_id)
  if coordinator == 'auto' or (given == (None,) * 3 and _in_cluster()):
    given = (None,) * 3
  elif given == (None,) * 3:
    return
  elif None in given or not 0 <= process_id < num_processes:
    raise ValueError(
      '--coordinator=HOST:PORT, --num_processes=N and --process_id=0..N-1 go'
      f' together; found {coordinator}, {num_processes} and {process_id}'
    )
  # Its watch over SIGTERM would take the place of ours, see preemption.py.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f'the processes did not find each other: {error}. Give --coordinator,'
      ' --num_processes and --process_id in every process.'
    ) from error
  logging.info(
    'process %d of %d, %d devices here of %d',
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def place(
  num_processes: int | None = None,
  process_id: int | None = None,
  environment: Mapping[str, str] = os.environ,
) -> tuple[int, int]:
  """(index, count) of this process among those that share some work.

  By what is given or, in a SLURM step, by its variables; they need not be
  joined.

  Raises:
    ValueError: one of the two is missing, or out of range.
  """
  if num_processes is None and process_id is None:
    count = int(environment.get('SLURM_STEP_NUM_TASKS', '1'))
    return int(environment['SLURM_PROCID']) if count > 1 else 0, count
  if (
    num_processes is None
    or process_id is None
    or not 0 <= process_id < num_processes
  ):
    raise ValueError(
      '--num_processes=N and --process_id=0..N-1 go together; found'
      f' {num_processes} and {process_id}'
    )
  return process_id, num_processes


def _in_cluster(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether jax can be told nothing: a SLURM step of tasks, or a TPU host."""
  if int(environment.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    return True
  return is_tpu_host(environment)


def is_tpu_host(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether there are chips here, and jax is to use them."""
  if 'tpu' not in environment.get('JAX_PLATFORMS', 'tpu'):
    return False
  chips = any(os.path.exists(path) for path in ('/dev/accel0', '/dev/vfio/0'))
  return chips and importlib.util.find_spec('libtpu') is not None
