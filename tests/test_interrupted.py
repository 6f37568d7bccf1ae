"""A training that is really killed ends as if it had not been."""

import json
import os
import signal
import time
import types

import jax
import numpy as np
import program_helpers
import pytest

from dmdd_jax import trainer as trainer_lib
from dmdd_jax.launch import preemption
from dmdd_jax.scoring import trained as trained_lib

pytestmark = pytest.mark.usefixtures('small_network')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp('data')
  program_helpers.write_data(root)
  return root


@pytest.fixture(scope='module')
def run(data, cache):
  def run(workdir, die=None):
    arguments = [f'--config.data.root={data}', f'--workdir={workdir}']
    process = program_helpers.start_main(arguments, cache, die=die)
    (status,), (said,) = program_helpers.finish(process)
    return status, said

  return run


def _checkpoints(workdir):
  return sorted(os.listdir(workdir / 'surface' / 'checkpoints'))


def _results(workdir):
  results = json.loads((workdir / 'surface' / 'results.json').read_text())
  for name in ('wall_time_s', 'finished', 'command', 'training_command'):
    del results[name]
  return results


def test_killed_at_several_moments_it_ends_as_if_it_had_not_been(run, tmp_path):
  """Bit for bit, though one kill comes in the middle of a save."""
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  status, said = run(whole)
  assert status == 0, said
  # Before there is any checkpoint.
  assert run(killed, 'step 1 9')[0] == -signal.SIGKILL
  assert _checkpoints(killed) == []
  # In the middle of the first save: what there is of it is no checkpoint.
  assert run(killed, 'save 2 9')[0] == -signal.SIGKILL
  assert '2' not in _checkpoints(killed)
  # Told to end: it takes the step it is at, saves, and says so.
  status, said = run(killed, 'step 2 15')
  assert status == preemption.STATUS, said
  assert 'SIGTERM: saved step 3 of 6' in said and 'exit status 75' in said
  assert _checkpoints(killed) == ['2', '3']
  # The newest checkpoint damaged, it goes on from the one before; killed in
  # the other phase, after a save.
  manifest = killed / 'surface' / 'checkpoints' / '3' / 'state/manifest.ocdbt'
  os.truncate(manifest, 10)
  status, said = run(killed, 'step 5 9')
  assert status == -signal.SIGKILL
  assert 'checkpoints/3 cannot be read: ' in said and 'restored step 2' in said
  found = _checkpoints(killed)
  assert found[:2] == ['2', '3.damaged']
  # On a busy machine the kill comes before step 4 is all there.
  last = 4 if '4' in found else 2
  status, said = run(killed)
  assert status == 0, said
  assert f'restored step {last}' in said
  states = [
    trained_lib.load_workdir(folder / 'surface')[1]
    for folder in (whole, killed)
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert _results(whole) == _results(killed)


def test_a_trace_ends_with_the_training_that_raises(tmp_path, monkeypatch):
  def broken(step, phase, batch, cache):
    raise RuntimeError('broken')

  trainer = object.__new__(trainer_lib.Trainer)
  trainer.config = program_helpers.tiny_run('')
  trainer.workdir = str(tmp_path)
  trainer.state = types.SimpleNamespace(step=0, params={})
  monkeypatch.setattr(trainer, 'batches', lambda first: iter([{}]))
  monkeypatch.setattr(trainer, '_step', broken)
  with pytest.raises(RuntimeError, match='broken'):
    trainer.run(range(0, 3))
  assert list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))
  with jax.profiler.trace(tmp_path / 'next'):  # There is one at a time.
    pass


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_so(signum, tmp_path, monkeypatch, warnings):
  saved = []

  def step(number, phase, batch, cache):
    trainer.state.step = number + 1
    os.kill(os.getpid(), signum)

  trainer = object.__new__(trainer_lib.Trainer)
  trainer.config = program_helpers.tiny_run('')
  trainer.workdir, trainer.directory = str(tmp_path), 'run/checkpoints'
  trainer.state = types.SimpleNamespace(step=0, params={})
  trainer.manager = None
  monkeypatch.setattr(trainer, 'batches', lambda first: iter([{}] * 6))
  monkeypatch.setattr(trainer, '_step', step)
  monkeypatch.setattr(trainer, '_log', lambda *_: None)
  monkeypatch.setattr(trainer, '_save', lambda done, clock: saved.append(done))
  monkeypatch.setattr(trainer_lib.checkpoint, 'wait', lambda manager: None)
  before = signal.getsignal(signum)
  with pytest.raises(preemption.Preempted) as caught:
    trainer.run()
  assert caught.value.code == preemption.STATUS and saved == [1]
  name = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}[signum]
  assert f'{name}: saved step 1 of 6 in run/checkpoints' in warnings[-1]
  assert signal.getsignal(signum) == before


def test_the_second_ctrl_c_ends_at_once():
  with pytest.raises(KeyboardInterrupt), preemption.watched(interrupts=True):
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.received()
    os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
  # Outside of the steps the first one does, or it would wait for minutes.
  with pytest.raises(KeyboardInterrupt), preemption.watched():
    os.kill(os.getpid(), signal.SIGINT)


def test_sleep_ends_with_a_signal():
  with preemption.watched():
    os.kill(os.getpid(), signal.SIGTERM)
    start = time.monotonic()
    preemption.sleep(60)
    assert time.monotonic() - start < 30
