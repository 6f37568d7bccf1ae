"""A step in parts, with recomputed blocks, and one that is not finite."""

import jax
import model_helpers
import numpy as np
import pytest

from dmdd_jax import sharding
from dmdd_jax.models import dmdd
from dmdd_jax.models import resnet
from dmdd_jax.training import steps
from dmdd_jax.training import train_state


@pytest.fixture(scope='module', autouse=True)
def small_network():
  """One block per stage: half of what there is to compile."""
  with pytest.MonkeyPatch.context() as patch:
    spec = resnet.Spec((1, 1, 1, 1), bottleneck=False)
    patch.setitem(resnet.SPECS, 'resnet10', spec)
    yield


def make_config(**changes):
  config = model_helpers.tiny_config(teacher__arch='resnet10', **changes)
  config.loss.focus = 0.0  # Its weights are of the rows at hand.
  for part in (config.train.student, config.train.head):
    part.update({'kind': 'sgd', 'learning_rate': 1e-3, 'warmup_fraction': 0.0})
  return config


def repeated_batch():
  """Four pairs, each twice in a row: both halves of a step see the four."""
  batch = model_helpers.make_batch(batch=4)
  return {name: np.repeat(rows, 2, axis=0) for name, rows in batch.items()}


class Steps:
  """The step functions of a config, and a state to begin with."""

  def __init__(self, **changes):
    self.config = make_config(**changes)
    self.model = dmdd.from_config(self.config)
    self.mesh = sharding.make_mesh(jax.devices()[:1])
    self.functions = steps.make_train_steps(self.config, self.model, self.mesh)
    self.start = model_helpers.make_state(self.config, self.model)

  def run(self, phase, *batches):
    state = sharding.replicate(self.mesh, jax.tree.map(np.copy, self.start))
    for batch in batches:
      rows = sharding.to_global(self.mesh, batch)
      state, metrics = self.functions[phase](state, rows)
    return jax.device_get((state, metrics))


@pytest.fixture(scope='module')
def whole():
  return Steps()


@pytest.fixture(scope='module')
def taken(whole):
  """State and metrics after one joint step on the repeated batch."""
  return whole.run('joint', repeated_batch())


def change(state, start):
  return jax.tree.map(np.subtract, state.params, start.params)


def check_same_update(found, expected, start, tolerance):
  """Relative to the size of each array's update."""
  pairs = zip(
    jax.tree.leaves(change(found, start)),
    jax.tree.leaves(change(expected, start)),
    strict=True,
  )
  for a, b in pairs:
    norm = np.linalg.norm(b)
    assert norm > 0 and np.linalg.norm(a - b) <= tolerance * norm


def test_parts_make_the_update_of_the_whole(whole, taken):
  """Where the parts' batch-norm statistics are those of the whole."""
  state, metrics = Steps(train__microbatch=4).run('joint', repeated_batch())
  # Rounding of the parameters themselves is part of the difference.
  check_same_update(state, taken[0], whole.start, 1e-3)
  for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(taken[0].params)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  for name, value in taken[1].items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
  # The statistics move twice by a tenth instead of once: 1 - 0.9^2 = 1.9 / 10.
  for a, b, start in zip(
    *(jax.tree.leaves(s.batch_stats) for s in (state, taken[0], whole.start))
  ):
    np.testing.assert_allclose(a - start, 1.9 * (b - start), atol=1e-4)


def test_parts_that_differ_add_up(monkeypatch):
  """Without batch statistics, of different rows too."""
  original = resnet.batch_norm
  monkeypatch.setattr(
    resnet, 'batch_norm', lambda train, *a, **k: original(False, *a, **k)
  )
  batch = model_helpers.make_batch(batch=8)
  whole, parts = Steps(), Steps(train__microbatch=2)
  state, metrics = whole.run('distill', batch)
  found, found_metrics = parts.run('distill', batch)
  for name, value in metrics.items():
    np.testing.assert_allclose(found_metrics[name], value, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(state.params)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert any(
    np.any(x) for x in jax.tree.leaves(change(found, whole.start)['student'])
  )
  # One part's activations at a time.
  rows = sharding.to_global(whole.mesh, batch)
  memory = [
    each.functions['distill']
    .lower(each.start, rows)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for each in (whole, parts)
  ]
  assert memory[1] < memory[0], memory


def test_recomputed_blocks_give_the_same_numbers(whole, taken):
  state, metrics = Steps(student__remat=True).run('joint', repeated_batch())
  for a, b in zip(
    jax.tree.leaves((state, metrics)), jax.tree.leaves(taken), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('trunk', ['reverse', 'encoder_decoder', 'encoder'])
def test_recomputing_changes_no_name_or_shape(trunk):
  shapes = [
    jax.eval_shape(
      lambda remat=remat: dmdd.init(
        dmdd.from_config(
          make_config(student__trunk=trunk, student__remat=remat)
        ),
        jax.random.key(0),
        32,
      )
    )
    for remat in (False, True)
  ]
  assert shapes[0] == shapes[1]


def test_a_loss_that_is_not_finite_freezes_the_state(whole, taken):
  """No later step changes it, so that it can be examined."""
  good = repeated_batch()
  bad = {**good, 'image': np.full_like(good['image'], np.nan)}
  state, _ = whole.run('joint', good, bad, good)
  assert train_state.frozen_at(state) == 1
  for name in ('params', 'batch_stats', 'opt_state'):
    assert all(
      model_helpers.leaves_equal(getattr(state, name), getattr(taken[0], name))
    )
