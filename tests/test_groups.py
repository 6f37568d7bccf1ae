"""Categories over groups of devices, against one after the other."""

import json
import os
import subprocess
import sys

import program_helpers
import pytest

from dmdd_jax.launch import groups
from dmdd_jax.launch import hosts
from dmdd_jax.launch import preemption

CATEGORIES = ('a', 'b', 'c', 'd')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Four categories that are not alike."""
  root = tmp_path_factory.mktemp('data')
  for seed, name in enumerate(CATEGORIES):
    os.rename(program_helpers.write_data(root, seed), root / name)
  return root


def _results(workdir):
  results = json.loads((workdir / 'results.json').read_text())
  for row in results.values():
    for name in (
      'wall_time_s',
      'finished',
      'config',
      'command',
      'training_command',
    ):
      row.pop(name, None)
  return results


def test_four_categories_on_four_groups_are_as_one_after_the_other(
  data, cache, tmp_path
):
  folders = {}
  for count in (1, 4):
    folders[count] = tmp_path / str(count)
    arguments = [
      f'--config.data.root={data}',
      f'--config.data.category={",".join(CATEGORIES)}',
      f'--config.mesh.category_groups={count}',
      '--config.train.total_steps=2',
      '--config.train.distill_steps=1',
      f'--workdir={folders[count]}',
    ]
    # Four CPU devices in four groups: each process has one.
    process = program_helpers.start_main(arguments, cache, devices=count)
    (status,), (said,) = program_helpers.finish(process)
    assert status == 0, said
  assert list(_results(folders[4])) == [*CATEGORIES, 'mean']
  assert _results(folders[4]) == _results(folders[1])
  assert (folders[4] / 'report.html').exists()
  for group, category in enumerate(CATEGORIES):
    log = (folders[4] / f'group_{group}.log').read_text()
    assert f'results in {folders[4] / category}/results.json' in log


def test_devices_divide_or_are_refused(monkeypatch):
  devices = {'cpu': 4}

  def count_devices(environment):
    return next(iter(devices.items()))

  monkeypatch.setattr(groups, '_count_devices', count_devices)
  flag = '--xla_force_host_platform_device_count='
  (first, second) = groups.environments(2, {'XLA_FLAGS': f'{flag}4'})
  assert first == second == {'XLA_FLAGS': f'{flag}4 {flag}2'}
  with pytest.raises(ValueError, match='4 CPU devices do not divide'):
    groups.environments(3, {})
  devices = {'cpu': 1}  # The cores of a machine are for all groups.
  assert groups.environments(3, {})[2] == {'XLA_FLAGS': f'{flag}1'}
  devices = {'gpu': 4}
  rows = groups.environments(2, {})
  assert [row['CUDA_VISIBLE_DEVICES'] for row in rows] == ['0,1', '2,3']
  devices = {'gpu': 2}
  rows = groups.environments(2, {'CUDA_VISIBLE_DEVICES': '5,7'})
  assert [row['CUDA_VISIBLE_DEVICES'] for row in rows] == ['5', '7']
  assert groups.environments(1, {}) == [{}]


def test_chips_of_a_tpu_host_are_slices_of_their_own(monkeypatch):
  monkeypatch.setattr(hosts, 'is_tpu_host', lambda environment: True)
  monkeypatch.setattr(groups, '_tpu_chips', lambda: list('0123'))
  first, second = groups.environments(2, {})
  assert first['TPU_VISIBLE_CHIPS'] == '0,1'
  assert second['TPU_VISIBLE_CHIPS'] == '2,3'
  for row in (first, second):
    assert row['TPU_CHIPS_PER_PROCESS_BOUNDS'] == '1,2,1'
    assert row['TPU_PROCESS_BOUNDS'] == '1,1,1'
  assert first['TPU_PROCESS_PORT'] != second['TPU_PROCESS_PORT']
  monkeypatch.setattr(groups, '_tpu_chips', lambda: list('012345'))
  with pytest.raises(ValueError, match='leaves 3 TPU chips to a group'):
    groups.environments(2, {})


# The first process runs its groups, which are processes of the same command.
# A group writes its index and exits with the status that STATUSES gives it;
# 'wait' waits for SIGTERM.
PROGRAM = """
import json, os, sys, time
workdir, count, place = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
if len(sys.argv) == 4:
  from absl import logging
  from dmdd_jax.launch import groups
  logging.set_verbosity(logging.INFO)
  try:
    groups.run(count, workdir, tuple(place))
  except ValueError as error:
    sys.exit(f'error: {error}')
else:
  group = sys.argv[4].removeprefix('--category_group=')
  status = json.loads(os.environ['STATUSES']).get(group, 0)
  if status == 'wait':
    import signal
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
  open(os.path.join(os.environ['STARTED'], group), 'w').close()
  if status == 'wait':
    time.sleep(300)
  sys.exit(status)
"""


@pytest.fixture
def start(tmp_path, cache):
  """Starts PROGRAM; the folder tmp_path/started names its groups."""
  started = tmp_path / 'started'
  started.mkdir()
  processes = []

  def start_one(count, place=(0, 1), workdir=tmp_path, **statuses):
    environment = {
      **program_helpers.environment(cache),
      'JAX_PLATFORMS': 'cpu',
      'STARTED': str(started),
      'STATUSES': json.dumps({k[1:]: v for k, v in statuses.items()}),
    }
    process = subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(workdir)]
      + [str(count), json.dumps(place)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    processes.append(process)
    return process

  yield start_one
  for process in processes:
    process.terminate()


def test_hosts_hold_the_groups_in_turns(start, tmp_path):
  """The shares of a host's groups are together the share of the host."""
  (status,), (log,) = program_helpers.finish(start(6, (1, 3)))
  assert status == 0, log
  started = sorted(int(name) for name in os.listdir(tmp_path / 'started'))
  assert started == [1, 4]
  shares = [groups.share(6, group, (1, 3)) for group in started]
  assert shares == [(1, 6), (4, 6)]
  of_groups = sorted(i for index, n in shares for i in range(15)[index::n])
  index, count = groups.share(6, None, (1, 3))
  assert of_groups == [*range(15)[index::count]]
  with pytest.raises(ValueError, match='use a multiple of 3'):
    groups.run(4, 'here', (1, 3))


def test_a_failed_group_is_named(start, tmp_path):
  local, remote = program_helpers.finish(
    start(2, _1=3), start(2, workdir='gs://there', _1=3)
  )[1]
  assert '1 of 2 groups on this host failed' in local
  assert f'see {tmp_path}/group_1.log' in local
  # Without logs of their own, the groups write into the log of the first.
  assert '1 of 2 groups on this host failed; see the log above' in remote


def test_sigterm_is_passed_on_to_the_groups(start, tmp_path):
  process = start(3, _0='wait', _1='wait', _2=3)
  program_helpers.wait_for(
    lambda: (
      len(os.listdir(tmp_path / 'started')) == 3 or process.poll() is not None
    )
  )
  process.terminate()
  (status,), (log,) = program_helpers.finish(process)
  assert status == preemption.STATUS, log
  assert '1 of 3 groups on this host failed' in log
  assert 'the groups [0, 1, 2] have ended' in log


@pytest.mark.parametrize('given', [(2, None), (None, 0), (2, 2)])
def test_a_place_is_given_whole(given):
  with pytest.raises(ValueError, match='--num_processes=N'):
    hosts.place(*given)


def test_a_place_is_given_or_slurm_s():
  assert hosts.place(3, 2) == (2, 3)
  step = {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3'}
  assert hosts.place(environment=step) == (3, 4)
  assert hosts.place(environment={'SLURM_PROCID': '0'}) == (0, 1)
