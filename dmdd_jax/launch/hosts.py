"""Joins the processes of several hosts into one program.

Experimental: run with two CPU processes on one machine. Never run: several
machines, TPU hosts and pods, SLURM.

Synopsis, before anything else asks jax for devices:

  hosts.initialize('10.0.0.1:8476', num_processes=2, process_id=0)
  hosts.initialize()  # On TPU pods and in SLURM, jax knows the other hosts.
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
      jax find all three arguments. Without any argument, jax finds them on a
      TPU host and in a SLURM step of several tasks; elsewhere there is only
      this process.
    num_processes: number of processes.
    process_id: index of this process, from 0.

  Raises:
    ValueError: one or two of the three arguments are missing, or the processes
      could not connect.
  """
  given = (coordinator, num_processes, process_id)
  if coordinator == 'auto' or (given == (None,) * 3 and _in_cluster()):
    given = (None,) * 3
  elif given == (None,) * 3:
    return
  elif None in given or not 0 <= process_id < num_processes:
    raise ValueError(
      '--coordinator=HOST:PORT, --num_processes=N and --process_id=0..N-1 go'
      f' together; they are {coordinator}, {num_processes} and {process_id}'
    )
  # jax's SIGTERM handler would replace ours, see preemption.py.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f'the processes could not connect: {error}. Give --coordinator,'
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
  """(index, count) of this process among those that share the work.

  Taken from the arguments or, in a SLURM step, from its variables. The
  processes need not be joined by `initialize`.

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
      '--num_processes=N and --process_id=0..N-1 go together; they are'
      f' {num_processes} and {process_id}'
    )
  return process_id, num_processes


def _in_cluster(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether jax finds the other processes itself: in SLURM or on a TPU."""
  if int(environment.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    return True
  return is_tpu_host(environment)


def is_tpu_host(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether this host has TPU chips, and jax may use them."""
  if 'tpu' not in environment.get('JAX_PLATFORMS', 'tpu'):
    return False
  chips = any(os.path.exists(path) for path in ('/dev/accel0', '/dev/vfio/0'))
  return chips and importlib.util.find_spec('libtpu') is not None
