"""Categories over groups of devices, against one after the other."""

import json
import os

import program_helpers
import pytest

from dmdd_jax.launch import groups
from dmdd_jax.launch import hosts
from dmdd_jax.launch import preemption

CATEGORIES = ('a', 'b', 'c', 'd')


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.getbasetemp() / 'compiled'


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
    for name in ('wall_time_s', 'finished', 'config'):
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
  found = [row['CUDA_VISIBLE_DEVICES'] for row in groups.environments(2, {})]
  assert found == ['0,1', '2,3']
  devices = {'gpu': 2}
  found = groups.environments(2, {'CUDA_VISIBLE_DEVICES': '5,7'})
  assert [row['CUDA_VISIBLE_DEVICES'] for row in found] == ['5', '7']
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


def test_hosts_hold_the_groups_in_turns(monkeypatch):
  """The shares of a host's groups are together the share of the host."""
  started = []

  def start(group, workdir, variables, log):
    started.append(group)

  def run(starts, at_a_time):
    for start_one in starts.values():
      start_one()
    return dict.fromkeys(starts, 0)

  monkeypatch.setattr(groups, '_start', start)
  monkeypatch.setattr(groups.children, 'run', run)
  monkeypatch.setattr(groups, '_count_devices', lambda environment: ('cpu', 1))
  monkeypatch.setattr(groups.jax.config, 'update', lambda name, value: None)
  assert groups.share(6, None, 'here', (1, 3)) == (1, 3)
  assert started == [1, 4]
  of_groups = sorted(i for group in started for i in range(15)[group::6])
  assert of_groups == [*range(15)[1::3]]
  assert groups.share(6, 4, 'here', (1, 3)) == (4, 6)
  with pytest.raises(ValueError, match='use a multiple of 3'):
    groups.run(4, 'here', (1, 3))


def test_a_group_that_failed_is_named(monkeypatch):
  statuses = {'group 0': 0, 'group 1': 1}
  monkeypatch.setattr(groups.children, 'run', lambda *_, at_a_time: statuses)
  monkeypatch.setattr(groups, '_count_devices', lambda environment: ('cpu', 1))
  with pytest.raises(ValueError, match=r'1 of 2 groups.*here/group_1\.log'):
    groups.run(2, 'here')
  with pytest.raises(ValueError, match='1 of 2 groups here failed, as said'):
    groups.run(2, 'gs://there')  # Their output is this process's.
  statuses['group 1'] = preemption.STATUS
  with pytest.raises(preemption.Preempted) as left:
    groups.run(2, 'here')
  assert left.value.code == preemption.STATUS


@pytest.mark.parametrize('given', [(2, None), (None, 0), (2, 2)])
def test_a_place_is_given_whole(given):
  with pytest.raises(ValueError, match='--num_processes=N'):
    hosts.place(*given)


def test_a_place_is_given_or_slurm_s():
  assert hosts.place(3, 2) == (2, 3)
  step = {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3'}
  assert hosts.place(environment=step) == (3, 4)
  assert hosts.place(environment={'SLURM_PROCID': '0'}) == (0, 1)
