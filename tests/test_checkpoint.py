"""Checkpoints that are damaged, or that cannot be saved."""

import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import model_helpers
import numpy as np
import optax
import program_helpers
import pytest

from configs import default
from dmdd_jax.training import checkpoint
from dmdd_jax.training import train_state

# Orbax leaves coroutines behind where TensorStore cannot read.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def make_state(step):
  values = np.random.default_rng(step).normal(size=(100, 100))
  return train_state.TrainState(
    step=jnp.int32(step),
    params={'student': {'kernel': jnp.asarray(values, jnp.float32)}},
    batch_stats={'student': {'mean': jnp.ones(5)}},
    opt_state={'student': (jnp.zeros(3),)},
    teacher={'params': {'kernel': jnp.ones((7, 7))}},
  )


def save(folder, *steps, keep=9):
  manager = checkpoint.open_manager(folder, keep)
  for step in steps:
    checkpoint.save(manager, step, make_state(step), {'step': step})
  checkpoint.close(manager)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with checkpoints of the steps 1, 2 and 3."""
  folder = tmp_path_factory.mktemp('saved')
  save(folder, 1, 2, 3)
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints')


@pytest.mark.parametrize('kind', ['muon', 'adam', 'sgd'])
def test_a_resumed_optimizer_goes_on_as_it_would_have(tmp_path, kind):
  """Three updates, saved and read, then three more: to the bit."""
  options = model_helpers.tiny_config().train.student
  options.update({'kind': kind, 'b1': 0.5})
  optimizer = train_state.make_optimizer(options, 6)
  rng = np.random.default_rng(0)
  shapes = {'kernel': (3, 3, 2, 4), 'scale': (4,)}

  def draw(shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  gradients = [{k: draw(s) for k, s in shapes.items()} for _ in range(6)]

  def go_on(state, gradients):
    params, opt_state = state.params, state.opt_state
    for gradient in gradients:
      updates, opt_state = optimizer.update(gradient, opt_state, params)
      params = optax.apply_updates(params, updates)
    return state.replace(params=params, opt_state=opt_state)

  params = {k: draw(s) for k, s in shapes.items()}
  state = make_state(0).replace(params=params, opt_state=optimizer.init(params))
  middle = go_on(state, gradients[:3])
  manager = checkpoint.open_manager(tmp_path / 'saved', 1)
  checkpoint.save(manager, 3, middle, {})
  checkpoint.wait(manager)
  restored = checkpoint.restore(manager, state, 3)
  checkpoint.close(manager)
  expected, found = (
    go_on(begun, gradients[3:]) for begun in (middle, restored)
  )
  assert all(model_helpers.leaves_equal(found, expected))


def test_the_rate_of_muon_means_nothing_to_other_optimizers():
  old, new = default.get_config(), default.get_config()
  for config in (old, new):
    config.train.student.kind = 'adam'
  new.train.student.muon_learning_rate = 0.1
  checkpoint.check_config('here', old.to_dict(), new)
  new.train.student.kind = old.train.student.kind = 'muon'
  with pytest.raises(checkpoint.CheckpointError, match='muon_learning_rate'):
    checkpoint.check_config('here', old.to_dict(), new)


def largest(folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=os.path.getsize)


def read_newest(manager, step=None):
  def read(step):
    meta = checkpoint.read_meta(manager, step)
    return meta['step'], checkpoint.restore(manager, make_state(0), step)

  return checkpoint.read_newest(manager, read, step)


def is_state(found, step):
  kernel = make_state(step).params['student']['kernel']
  return np.array_equal(found.params['student']['kernel'], kernel)


@pytest.mark.parametrize('where', ['state', 'meta'])
@pytest.mark.parametrize('size', [0, 0.5, None])
def test_a_damaged_newest_is_left_out_and_named(folder, where, size, caplog):
  """Empty, half there, or gone; its arrays or its document."""
  path = largest(folder / '3' / where)
  if where == 'meta':
    path = folder / '3' / 'meta' / 'metadata'
  if size is None:
    os.remove(path)
  else:
    os.truncate(path, int(size * os.path.getsize(path)))
  manager = checkpoint.open_manager(folder)
  step, state = read_newest(manager)
  assert step == 2 and is_state(state, 2)
  warning = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  assert any(f'{folder}/3 cannot be read: ' in line for line in warning)
  # Asked for by its step, it is an error.
  with pytest.raises(checkpoint.DamagedError, match=f'{folder}/3 cannot be'):
    read_newest(manager, 3)
  checkpoint.close(manager)


def test_reading_says_nothing_and_changes_nothing(folder, caplog):
  def listed():
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}

  before = listed()
  manager = checkpoint.open_manager(folder)
  assert read_newest(manager)[0] == 3
  checkpoint.close(manager)
  assert listed() == before
  assert not [r for r in caplog.records if r.levelname == 'WARNING']


def test_after_going_on_the_same_step_is_saved_again(folder):
  os.truncate(largest(folder / '3' / 'state'), 10)
  manager = checkpoint.open_manager(folder, 9)
  assert read_newest(manager)[0] == 2
  checkpoint.set_aside(manager, 2)
  checkpoint.save(manager, 3, make_state(3), {'step': 3})
  checkpoint.close(manager)
  names = sorted(path.name for path in folder.iterdir() if path.is_dir())
  assert names == ['1', '2', '3', '3.damaged']
  manager = checkpoint.open_manager(folder)
  step, state = read_newest(manager)
  assert step == 3 and is_state(state, 3)


def test_nothing_but_damage_is_refused(folder):
  for step in '123':
    os.truncate(largest(folder / step / 'state'), 10)
  manager = checkpoint.open_manager(folder)
  with pytest.raises(checkpoint.CheckpointError, match=r'\[3, 2, 1\] are dam'):
    read_newest(manager)


def test_a_vanished_folder_is_said_and_not_begun_again(folder):
  manager = checkpoint.open_manager(folder, 9)
  os.rename(folder, f'{folder}.gone')
  with pytest.raises(checkpoint.CheckpointError, match='vanished') as error:
    checkpoint.save(manager, 4, make_state(4), {})
  assert str(folder) in str(error.value)
  assert not folder.exists()


# Files of this process may have 20 kB: writing fails as on a full disk.
FULL = """
import resource, sys
import test_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
  test_checkpoint.save(sys.argv[1], 4)
except test_checkpoint.checkpoint.CheckpointError as error:
  print(error)
"""


def test_a_full_disk_is_one_error_and_keeps_what_was_saved(folder):
  tests = os.path.dirname(__file__)
  path = os.pathsep.join([program_helpers.REPOSITORY, tests])
  done = subprocess.run(
    [sys.executable, '-c', FULL, str(folder)],
    env={**os.environ, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  assert f'could not be saved to {folder}' in line
  assert 'steps [1, 2, 3] are kept' in line and 'File too large' in line
  # The next run clears what is left of it and saves that step.
  save(folder, 4)
  manager = checkpoint.open_manager(folder)
  assert read_newest(manager)[0] == 4
  assert not list(folder.glob('*tmp*'))
