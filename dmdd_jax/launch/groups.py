"""Categories over groups of devices: a process for each group.

A process uses all devices that it sees, so each group is a process that sees
only its own devices. Group i of n trains the categories i, i + n, ... Host h of
m runs the groups h, h + m, ...; the hosts do not talk to each other, but must
see one workdir.

Experimental: run on the CPU devices of one host only. Never run: groups of GPUs
or of TPU chips, and groups on several hosts.

Synopsis, in the first process of a host:

  groups.run(4, 'runs/mvtec', hosts.place())
  share = groups.share(4, FLAGS.category_group, hosts.place())
"""

from collections.abc import Mapping
import functools
import glob
import os
import subprocess
import sys

from absl import logging

from dmdd_jax import storage
from dmdd_jax.launch import children
from dmdd_jax.launch import hosts
from dmdd_jax.launch import preemption

# Chips of one process along x, y and z, by the number of its chips.
_TPU_BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1', 8: '2,4,1'}
_TPU_PORT = 8476
_COUNT = 'import jax; print(jax.default_backend(), jax.local_device_count())'


def share(
  count: int, group: int | None, place: tuple[int, int]
) -> tuple[int, int]:
  """The share of the categories that this process runs.

  Args:
    count: number of groups over all hosts.
    group: the group that this process is, if `run` started it; None in the
      first process of a host, whose share is that of all groups of the host.
    place: (index, count) of this host.

  Returns:
    (index, count): every count-th category from that index on.
  """
  return place if group is None else (group, count)


def run(count: int, workdir: str, place: tuple[int, int] = (0, 1)) -> None:
  """Runs this program's command in each group of this host; waits for all.

  Each group gets `--category_group`. With several groups on this host and a
  local workdir, each writes its log to WORKDIR/group_I.log.

  Args:
    count: number of groups over all hosts.
    workdir: of the run.
    place: (index, count) of this host.

  Raises:
    ValueError: the groups do not divide over the hosts, or the devices over
      the groups, or a group failed.
    Preempted: SIGTERM or Ctrl-C came, and the groups have ended.
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
  names = {f'group {group}': group for group in mine}
  starts = {
    name: functools.partial(_start, group, workdir, variables, log)
    for (name, group), variables in zip(names.items(), visible, strict=True)
  }
  outcome = children.run(starts, at_a_time=len(mine))
  logs = [_log(workdir, names[name]) for name in outcome.failed if log]
  failure = f'{len(outcome.failed)} of {len(mine)} groups on this host failed'
  failure += f'; see {", ".join(logs)}' if logs else '; see the log above'
  if outcome.preempted:
    if outcome.failed:
      logging.error(failure)
    preemption.leave(f'the groups {[*mine]} have ended')
  if outcome.failed:
    raise ValueError(failure)


def environments(
  count: int, environment: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
  """Environment variables that show each group its part of the devices.

  The CPU is one device by default. Then every group has one CPU device, and
  all groups share the cores.

  Args:
    count: number of groups on this host.
    environment: of this process.

  Returns:
    The variables to set for each of the groups.

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
  """Platform and number of devices, counted by a process of its own.

  This process must not hold them: the groups need them.
  """
  process = subprocess.run(
    [sys.executable, '-c', _COUNT],
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  platform, count = process.stdout.split()
  return platform, int(count)


def _tpu_chips() -> list[str]:
  """The numbers of this host's chips."""
  chips = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
  return [str(i) for i in range(len(chips))]


def _tpu_variables(group: int, chips: list[str]) -> dict[str, str]:
  """Variables of libtpu that make these chips a slice of one process.

  Experimental: never run on a TPU.
  """
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
