"""How many steps a number of minutes gives."""

import jax
import pytest

from configs import default
from dmdd_jax import budget


@pytest.mark.parametrize(
  'minutes, seconds, share, expected',
  [
    # 8 of 10 steps of 1 s and 2 of .5 s: .9 s a step, 666 steps in 10 minutes.
    (10, {'distill': 1.0, 'segment': 0.5}, 0.8, (660, 528)),
    (1, {'joint': 2.0}, 0.8, (30, 24)),
    (0.001, {'distill': 1.0, 'segment': 1.0}, 0.8, (2, 1)),
    (0.001, {'distill': 1.0}, 1.0, (1, 1)),
  ],
)
def test_steps_of_a_budget(minutes, seconds, share, expected):
  assert budget.split(minutes, seconds, share) == expected


@pytest.fixture
def clock(monkeypatch):
  """Steps take 2 s, then .5 s; the first of each takes a minute, to compile."""
  now = [0.0]

  class FakeTrainer:
    """Takes no step."""

    state = ()

    def __init__(self, config, workdir):
      self.config = config

    def run(self, progress):
      train = self.config.train
      for done in range(1, train.total_steps + 1):
        first = done in (1, train.distill_steps + 1)
        now[0] += 60 if first else 2 if done <= train.distill_steps else 0.5
        progress(done, train.total_steps)

    def close(self):
      now.append('closed')

  monkeypatch.setattr(budget.trainer_lib, 'Trainer', FakeTrainer)
  monkeypatch.setattr(budget.time, 'monotonic', lambda: now[0])
  return now


def test_a_steps_time_is_measured_without_what_compiles(clock):
  config = default.get_config()
  assert budget.step_seconds(config) == {'distill': 2.0, 'segment': 0.5}
  assert clock[1:] == ['closed']
  config.train.distill_steps = config.train.total_steps
  assert budget.step_seconds(config) == {'distill': 2.0}
  config.train.distill_steps = 0
  assert budget.step_seconds(config) == {'segment': 0.5}


def test_the_picked_config(clock, monkeypatch, warnings):
  config = default.get_config()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  picked = budget.pick(config, 10)
  # 8 of 10 steps of 2 s and 2 of .5 s: 1.7 s a step.
  assert (picked.train.total_steps, picked.train.distill_steps) == (350, 280)
  assert picked.train.batch_size == 32 and config.train.total_steps == 5000
  assert not warnings
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  assert budget.pick(config, 10).train.batch_size == 4
  assert budget.pick(config, 10, keep_batch=True).train.batch_size == 32
  budget.pick(config, 1)
  assert 'only 35 steps' in warnings[0]


@pytest.mark.parametrize('minutes', [0, -1, '20', float('nan'), True])
def test_what_is_no_number_of_minutes(minutes):
  with pytest.raises(ValueError, match='a number above 0'):
    budget.pick(default.get_config(), minutes)
