"""The training loop: what it hands to a step, and when it looks at results."""

import program_helpers
import pytest

from dmdd_jax import trainer as trainer_lib

pytestmark = pytest.mark.usefixtures('small_network')


class Unread:
  """The result of a step that no one may wait for."""

  def __array__(self, *unused_arguments, **unused_options):
    raise AssertionError('a result was fetched from the devices')

  __bool__ = __float__ = __int__ = __array__


class Enough(Exception):
  """Ends the training."""


def test_no_step_waits_for_the_one_before(tmp_path):
  """Results stay on the devices until a log line, so steps can queue there."""
  program_helpers.write_data(tmp_path / 'data')
  config = program_helpers.tiny_run(
    tmp_path / 'data',
    train__total_steps=20,
    train__distill_steps=2,
    train__log_every=10,
    train__checkpoint_every=20,
  )
  trainer, inputs = trainer_lib.Trainer(config, str(tmp_path / 'run')), []
  start = trainer.state

  def step(state, batch):
    inputs.append(sorted(batch))
    if len(inputs) == 1:  # The first step has a log line of its own.
      return start, {'loss': 1.0}
    if len(inputs) == 5:
      raise Enough
    return Unread(), {'loss': Unread()}

  trainer.step_functions = {'distill': step, 'segment': step}
  try:
    with pytest.raises(Enough):
      trainer.run()
  finally:
    trainer.close()
  # Only what the phase reads is sent to the devices.
  assert inputs[:2] == [['image', 'mask', 'normal']] * 2
  assert inputs[2:] == [['image', 'mask']] * 3
