"""Several processes, and groups of devices, against one process."""

import json
import os
import shutil

import jax
import numpy as np
import program_helpers
import pytest

from dmdd_jax.launch import hosts
from dmdd_jax.launch import lock
from dmdd_jax.launch import preemption
from dmdd_jax.scoring import trained as trained_lib

FIGURES = ('image_auroc', 'pixel_auroc', 'pixel_ap', 'au_pro')
pytestmark = pytest.mark.usefixtures('small_network')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp('data')
  surface = program_helpers.write_data(root)
  for name in ('b', 'c', 'd'):
    shutil.copytree(surface, root / name)
  return root


def _arguments(data, workdir, *more):
  return [
    f'--config.data.root={data}',
    f'--workdir={workdir}',
    # Rates at which rounding stays rounding.
    '--config.train.student.kind=sgd',
    '--config.train.head.kind=sgd',
    '--config.train.microbatch=2',
    *more,
  ]


@pytest.fixture(scope='module')
def one(data, cache, tmp_path_factory):
  """The folder of a run of one process with two devices."""
  workdir = tmp_path_factory.mktemp('one')
  arguments = _arguments(data, workdir, '--profile_steps=1:3')
  process = program_helpers.start_main(arguments, cache, devices=2)
  (status,), (said,) = program_helpers.finish(process)
  assert status == 0, said
  return workdir


def _read(workdir, category='surface'):
  return json.loads((workdir / category / 'results.json').read_text())


def _check_same(workdir, expected):
  """Weights and figures, but for the order in which two numbers are added."""
  found, like = (
    trained_lib.load_workdir(folder / 'surface')[1]
    for folder in (workdir, expected)
  )
  for a, b in zip(
    jax.tree.leaves((found.params, found.batch_stats)),
    jax.tree.leaves((like.params, like.batch_stats)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  found, like = _read(workdir), _read(expected)
  for name in FIGURES:
    assert found[name] == pytest.approx(like[name], abs=1e-4), name
  for name in ('image_threshold', 'pixel_threshold'):
    threshold = found['calibration'][name]
    assert threshold == pytest.approx(like['calibration'][name], rel=1e-3)


@pytest.fixture(scope='module')
def two(data, cache, one, tmp_path_factory):
  """The folder of a run of two processes, and what they said."""
  workdir = tmp_path_factory.mktemp('two')
  processes = program_helpers.start_processes(_arguments(data, workdir), cache)
  statuses, said = program_helpers.finish(*processes)
  assert statuses == [0, 0], said
  return workdir, said


def test_two_processes_are_as_one_with_two_devices(
  data, cache, one, two, tmp_path
):
  """Training, checkpoints and evaluation; and one process goes on."""
  workdir, said = two
  _check_same(workdir, one)
  # The first process alone wrote tables, pictures and events.
  assert 'process 1 of 2, 1 devices here of 2' in said[1]
  assert 'results in' in said[0] and 'results in' not in said[1]
  assert len(list((workdir / 'surface').glob('events.out.*'))) == 1
  scores = (workdir / 'surface' / 'scores.csv').read_text().splitlines()
  expected = (one / 'surface' / 'scores.csv').read_text().splitlines()
  assert len(scores) == len(expected)  # Every image once.
  # What two have saved, one goes on with.
  again = shutil.copytree(workdir, tmp_path / 'again')
  os.remove(again / 'surface' / 'results.json')
  shutil.rmtree(again / 'surface' / 'checkpoints' / '6')
  arguments = _arguments(data, again)
  process = program_helpers.start_main(arguments, cache, devices=2)
  (status,), (said,) = program_helpers.finish(process)
  assert status == 0 and 'restored step 4' in said, said
  _check_same(again, one)


def test_told_to_end_all_save_one_step_and_leave(data, cache, two, tmp_path):
  """One is told, then both; the same bits as those that nobody told."""
  for die, step in (
    ((None, 'step 2 15'), 4),
    (('step 4 15', 'step 4 15'), 6),
  ):
    processes = program_helpers.start_processes(
      _arguments(data, tmp_path), cache, die
    )
    statuses, said = program_helpers.finish(*processes)
    assert statuses == [preemption.STATUS] * 2, said
    assert all(f'SIGTERM: saved step {step} of 6' in text for text in said)
    assert all('restored step 4' in text for text in said) == (step == 6)
  states = [
    trained_lib.load_workdir(folder / 'surface')[1]
    for folder in (tmp_path, two[0])
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_steps_are_traced_where_asked(one):
  assert list((one / 'surface' / 'plugins' / 'profile').glob('*/*.xplane.pb'))


@pytest.mark.parametrize(
  'given', [('here:1', None, None), ('here:1', 2, 2), (None, 2, 0)]
)
def test_flags_that_do_not_go_together_are_refused(given):
  with pytest.raises(ValueError, match='--coordinator=HOST:PORT'):
    hosts.initialize(*given)


def test_nothing_given_and_no_cluster_is_one_process(monkeypatch):
  monkeypatch.setattr(hosts, '_in_cluster', lambda: False)
  hosts.initialize()
  assert not jax.distributed.is_initialized()


def test_a_slurm_step_of_tasks_and_a_tpu_host_are_known(monkeypatch):
  assert hosts._in_cluster({'SLURM_STEP_NUM_TASKS': '2'})
  # A script of sbatch is one process, whatever it asked for.
  assert not hosts._in_cluster({'SLURM_NTASKS': '2', 'JAX_PLATFORMS': 'cpu'})
  monkeypatch.setattr(os.path, 'exists', lambda path: path == '/dev/accel0')
  monkeypatch.setattr(hosts.importlib.util, 'find_spec', lambda name: name)
  assert hosts._in_cluster({})
  assert not hosts._in_cluster({'JAX_PLATFORMS': 'cpu'})


def test_a_folder_in_use_refuses_all_processes(data, cache, tmp_path):
  """Though process 0 alone looks at the lock."""
  folder = tmp_path / 'surface'
  folder.mkdir()
  owner = {'host': 'far-away', 'pid': 1, 'born': '', 'since': 'now'}
  (folder / lock.NAME).write_text(json.dumps(owner))
  processes = program_helpers.start_processes(_arguments(data, tmp_path), cache)
  statuses, said = program_helpers.finish(*processes)
  assert statuses == [1, 1], said
  assert 'error: process 1 on host far-away' in said[0]
  assert 'error: process 0 was refused' in said[1]
  assert os.listdir(folder) == [lock.NAME]
