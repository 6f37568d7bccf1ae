"""Categories over groups of devices: a process for each group.

A process is given all devices that it sees, so a group is a process that sees
its own. Group i of n trains the categories i, i + n, ... The processes of
several hosts hold the groups in turns; they need not know of each other, but
must see one workdir.

Synopsis:

  share = groups.share(4, FLAGS.category_group, 'runs/mvtec', hosts.place())
  train.run_categories(config, 'runs/mvtec', share=share)
"""

from collections.abc import Mapping
import functools
import glob
import os
import subprocess
import sys

from absl import logging
import jax

from dmdd_jax import storage
from dmdd_jax.launch import children
from dmdd_jax.launch import hosts
from dmdd_jax.launch import preemption

# Chips of one process in x, y and z, for what a host may divide into.
_TPU_BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1', 8: '2,4,1'}
_TPU_PORT = 8476
_COUNT = 'import jax; print(jax.default_backend(), jax.local_device_count())'


def share(
  count: int, group: int | None, workdir: str, place: tuple[int, int]
) -> tuple[int, int]:
  """Which categories this process shall run: (index, count) of shares.

  That is the share of its group. Without one, the groups of this host are run
  first, which leaves the table to this process, and needs no accelerator.

  Args:
    count: groups, over all hosts.
    group: which one this process is, as `run` has started it; None is none.
    workdir: of the run.
    place: (index, count) of this host.

  Raises:
    ValueError, Preempted: see `run`.
  """
  if group is not None:
    return group, count
  jax.config.update('jax_platforms', 'cpu')
  run(count, workdir, place)
  return place


def run(count: int, workdir: str, place: tuple[int, int] = (0, 1)) -> None:
  """Runs this program's command in each group of this host; waits for all.

  Each gets `--category_group` and, with several here and a local workdir,
  writes to WORKDIR/group_I.log.

  Args:
    count: groups, over all hosts.
    workdir: of the run.
    place: (index, count) of this host.

  Raises:
    ValueError: the groups do not divide over the hosts, or the devices over
      the groups, or a group failed.
    Preempted: SIGTERM came, and the groups have ended.
  """
  index, number = place
  if count % number:
    raise ValueError(
      f'config.mesh.category_groups = {count} does not divide over {number}'
      f' hosts; use a multiple of {number}'
    )
  mine = range(index, count, number)
  visible = environments(len(mine))
  log = len(mine) > 1 and not storage.is_remote(workdir)
  starts = {
    f'group {group}': functools.partial(_start, group, workdir, variables, log)
    for group, variables in zip(mine, visible, strict=True)
  }
  statuses = [*children.run(starts, at_a_time=len(mine)).values()]
  failed = [
    group
    for group, status in zip(mine, statuses)
    if status not in (0, preemption.STATUS)
  ]
  logs = [_log(workdir, group) for group in failed if log]
  failure = f'{len(failed)} of {len(mine)} groups here failed'
  failure += f'; see {", ".join(logs)}' if logs else ', as said above'
  if preemption.STATUS in statuses:
    if failed:
      logging.error(failure)
    preemption.leave(f'the groups {[*mine]} have ended')
  if failed:
    raise ValueError(failure)


def environments(
  count: int, environment: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
  """Variables by which each of `count` groups sees its part of the devices.

  CPUs are one device by default: then every group has one, and the cores are
  for all.

  Raises:
    ValueError: the devices do not divide.
  """
  if count == 1:
    return [{}]
  if hosts.is_tpu_host(environment):
    chips = _divide(_tpu_chips(), count, 'TPU chips')
    return [_tpu_variables(group, part) for group, part in enumerate(chips)]
  platform, devices = _count_devices(environment)
  ids = [str(i) for i in range(devices)]
  if platform == 'cpu':
    size = 1 if devices == 1 else len(_divide(ids, count, 'CPU devices')[0])
    flags = environment.get('XLA_FLAGS', '')
    flags += f' --xla_force_host_platform_device_count={size}'
    return [{'XLA_FLAGS': flags.strip()}] * count
  name = 'CUDA_VISIBLE_DEVICES'
  if environment.get(name):
    ids = environment[name].split(',')
  return [{name: ','.join(part)} for part in _divide(ids, count, 'GPUs')]


def _divide(ids: list[str], count: int, what: str) -> list[list[str]]:
  if len(ids) % count:
    raise ValueError(
      f'{count} of config.mesh.category_groups are on this host, and its'
      f' {len(ids)} {what} do not divide into them'
    )
  size = len(ids) // count
  return [ids[i : i + size] for i in range(0, len(ids), size)]


def _count_devices(environment: Mapping[str, str]) -> tuple[str, int]:
  """Platform and number of devices, asked in a process that lets them go."""
  found = subprocess.run(
    [sys.executable, '-c', _COUNT],
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  platform, count = found.stdout.split()
  return platform, int(count)


def _tpu_chips() -> list[str]:
  """The numbers of this host's chips."""
  chips = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
  return [str(i) for i in range(len(chips))]


def _tpu_variables(group: int, chips: list[str]) -> dict[str, str]:
  """What libtpu reads: a slice of one process, with these chips."""
  if len(chips) not in _TPU_BOUNDS:
    raise ValueError(
      f'config.mesh.category_groups leaves {len(chips)} TPU chips to a group;'
      f' it can have {sorted(_TPU_BOUNDS)}'
    )
  port = str(_TPU_PORT + group)
  return {
    'TPU_VISIBLE_CHIPS': ','.join(chips),
    'TPU_CHIPS_PER_PROCESS_BOUNDS': _TPU_BOUNDS[len(chips)],
    'TPU_PROCESS_BOUNDS': '1,1,1',
    'TPU_PROCESS_ADDRESSES': f'localhost:{port}',
    'TPU_PROCESS_PORT': port,
    'CLOUD_TPU_TASK_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }


def _start(
  group: int, workdir: str, variables: Mapping[str, str], log: bool
) -> subprocess.Popen:
  """Starts this command again, for one group."""
  command = [sys.executable, *sys.orig_argv[1:], f'--category_group={group}']
  environment = {**os.environ, **variables}
  if not log:
    return subprocess.Popen(command, env=environment)
  path = _log(workdir, group)
  os.makedirs(workdir, exist_ok=True)
  logging.info('group %d: log in %s', group, path)
  with open(path, 'a') as file:
    return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _log(workdir: str, group: int) -> str:
  return os.path.join(workdir, f'group_{group}.log')
