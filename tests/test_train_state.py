"""The training state, and the optimisers by hand."""

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import pytest

from dmdd_jax.models import dmdd
from dmdd_jax.training import train_state

# --- the state ---------------------------------------------------------------


def hand_made_variables():
  """One small leaf per part and collection, all different."""
  return {
    name: {
      part: {'weight': np.full(3, 10.0 * i + j, np.float32)}
      for j, part in enumerate(('teacher', 'student', 'head'))
    }
    for i, name in enumerate(('params', 'batch_stats'))
  }


@pytest.fixture
def initialised(monkeypatch):
  """`dmdd.init` returns `hand_made_variables`; the list of its arguments."""
  calls = []

  def init(*arguments):
    calls.append(arguments)
    return hand_made_variables()

  monkeypatch.setattr(dmdd, 'init', init)
  return calls


@pytest.mark.parametrize('given', [True, False])
@pytest.mark.parametrize('kind', ['multi_perception', 'none'])
def test_create(initialised, kind, given):
  config = model_helpers.tiny_config(head__kind=kind)
  initial = hand_made_variables()
  teacher = {name: {'weight': np.full(3, -1.0)} for name in initial}
  state = train_state.create(config, 'model', 'key', teacher if given else None)
  assert initialised == [('model', 'key', 32)]
  assert state.step == 0 and state.step.dtype == jnp.int32
  parts = {'student'} | ({'head'} if kind != 'none' else set())
  variables = train_state.variables(state)
  for name in ('params', 'batch_stats'):
    weight = teacher[name] if given else initial[name]['teacher']
    expected = {part: initial[name][part] for part in parts}
    expected['teacher'] = weight
    assert jax.tree.map(np.ndarray.tolist, jax.device_get(variables[name])) == (
      jax.tree.map(np.ndarray.tolist, expected)
    )
    assert set(getattr(state, name)) == parts
  assert set(state.opt_state) == parts
  # What `model_helpers.make_state` relies on: an optimiser starts at zero.
  assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


# --- optimisers --------------------------------------------------------------


def optimizer_options(**changes):
  """Plain gradient descent: an update is minus rate times gradient."""
  plain = {
    'kind': 'sgd',
    'b1': 0.0,
    'clip_norm': 0.0,
    'warmup_fraction': 0.0,
    'learning_rate': 0.1,
  }
  options = model_helpers.tiny_config().train.student
  options.update({**plain, **changes})
  return options


def updates_of(optimizer, gradient, params, count):
  """The updates of so many steps, params kept: (count, len(params))."""

  @jax.jit
  def run(gradient, params):
    def step(state, _):
      update, state = optimizer.update(gradient, state, params)
      return state, update

    return jax.lax.scan(step, optimizer.init(params), None, count)[1]

  return np.asarray(
    run(jnp.asarray(gradient, jnp.float32), jnp.asarray(params, jnp.float32))
  )


def rates(options, total, count=None):
  optimizer = train_state.make_optimizer(options, total)
  return -updates_of(optimizer, [1.0], [0.0], count or total)[:, 0]


def test_warmup_then_cosine():
  options = optimizer_options(warmup_fraction=0.2)
  found = rates(options, 10)
  # Two steps of warm-up, half and three quarters of the peak, then a cosine
  # over the eight that are left.
  cosine = 0.5 * (1.0 + np.cos(np.pi * np.arange(8) / 8))
  expected = 0.1 * np.concatenate([[0.5, 0.75], cosine])
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_warmup_rises_linearly_to_the_peak():
  found = rates(optimizer_options(warmup_fraction=0.5), 20)
  rise = np.diff(found[:11])
  np.testing.assert_allclose(rise, rise[0], rtol=1e-3)
  assert found[0] == pytest.approx(0.01)
  assert found[10] == pytest.approx(0.1) == np.max(found)


def test_cosine_without_warmup_ends_at_zero():
  found = rates(optimizer_options(), 10, 13)
  expected = 0.05 * (1.0 + np.cos(np.pi * np.arange(10) / 10))
  np.testing.assert_allclose(found[:10], expected, rtol=1e-5)
  np.testing.assert_allclose(found[10:], 0.0, atol=1e-8)


def test_constant_schedule():
  found = rates(optimizer_options(schedule='constant'), 4)
  np.testing.assert_allclose(found, 0.1)
  warm = rates(optimizer_options(schedule='constant', warmup_fraction=0.5), 4)
  np.testing.assert_allclose(warm, [0.05, 0.075, 0.1, 0.1], rtol=1e-6)


def test_a_part_without_steps_has_an_optimizer_all_the_same():
  assert np.all(np.isfinite(rates(optimizer_options(), 0, 2)))


def test_clip_scales_to_the_norm_and_no_further():
  options = optimizer_options(schedule='constant', clip_norm=1.0)
  optimizer = train_state.make_optimizer(options, 1)
  found = updates_of(optimizer, [3.0, 4.0], [0.0, 0.0], 1)[0]
  np.testing.assert_allclose(found, [-0.06, -0.08], rtol=1e-5)
  found = updates_of(optimizer, [0.3, 0.4], [0.0, 0.0], 1)[0]
  np.testing.assert_allclose(found, [-0.03, -0.04], rtol=1e-5)


def test_adam_by_hand():
  options = optimizer_options(
    kind='adam', schedule='constant', b1=0.5, b2=0.99, weight_decay=0.01
  )
  optimizer = train_state.make_optimizer(options, 3)
  found = updates_of(optimizer, [2.0, -0.5], [1.0, 3.0], 3)
  # Equal gradients: corrected moments are g and g^2, so the step is the sign;
  # decoupled decay adds 0.01 of the parameter.
  expected = -0.1 * (np.sign([2.0, -0.5]) + 0.01 * np.array([1.0, 3.0]))
  np.testing.assert_allclose(found, [expected] * 3, rtol=1e-4)


def test_muon_takes_kernels_as_matrices_and_adam_the_rest():
  options = optimizer_options(
    kind='muon',
    schedule='constant',
    b1=0.5,
    learning_rate=0.01,
    muon_learning_rate=0.1,
  )
  optimizer = train_state.make_optimizer(options, 3)
  rng = np.random.default_rng(0)
  gradient = {
    'kernel': rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
    'bias': np.float32([2.0, -0.5]),
  }
  params = jax.tree.map(jnp.zeros_like, gradient)
  found, _ = optimizer.update(gradient, optimizer.init(params), params)
  # Nesterov's momentum makes the first step longer, 1 + b1 / (1 + b1) of it.
  step = 0.01 * 4.0 / 3.0
  np.testing.assert_allclose(found['bias'], [-step, step], rtol=1e-4)
  # Nothing is left of the gradient's singular values but that they are > 0:
  # five Newton-Schulz iterations bring all of them near 1.
  left, _, right = np.linalg.svd(
    gradient['kernel'].reshape(18, 4), full_matrices=False
  )
  update = np.reshape(found['kernel'], (18, 4)) / -0.1
  values = left.T @ update @ right.T
  np.testing.assert_allclose(values - np.diag(np.diag(values)), 0.0, atol=1e-4)
  assert np.all((np.diag(values) > 0.6) & (np.diag(values) < 1.3))


def test_sgd_momentum_and_decay_by_hand():
  options = optimizer_options(schedule='constant', b1=0.5, weight_decay=0.1)
  optimizer = train_state.make_optimizer(options, 3)
  found = updates_of(optimizer, [1.0], [2.0], 3)[:, 0]
  # g = 1 + 0.1 * 2, summed with half of what came before.
  np.testing.assert_allclose(found, [-0.12, -0.18, -0.21], rtol=1e-5)


@pytest.mark.parametrize(
  'changes, student_steps, head_steps',
  [
    ({}, 20, 40),
    ({'train__joint': True}, 60, 60),
    # Without a head the student is trained in every step.
    ({'head__kind': 'none'}, 60, None),
    ({'head__kind': 'none', 'train__joint': True}, 60, None),
    ({'train__distill_steps': 60}, 60, 1),
  ],
)
def test_schedules_span_the_steps_of_their_part(
  changes, student_steps, head_steps
):
  config = model_helpers.tiny_config(
    train__total_steps=60, train__student=optimizer_options(), **changes
  )
  config.train.head.update(optimizer_options(learning_rate=0.2))
  optimizers = train_state.make_optimizers(config)
  expected = {'student': (student_steps, 0.1), 'head': (head_steps, 0.2)}
  if head_steps is None:
    del expected['head']
  assert set(optimizers) == set(expected)
  for part, (length, peak) in expected.items():
    found = -updates_of(optimizers[part], [1.0], [0.0], 60)[:, 0]
    fraction = np.minimum(np.arange(60) / length, 1.0)
    cosine = 0.5 * peak * (1.0 + np.cos(np.pi * fraction))
    np.testing.assert_allclose(found, cosine, rtol=1e-4, atol=1e-7)


# --- frozen states -----------------------------------------------------------


@pytest.mark.parametrize('step', [0, 1, 7])
def test_a_frozen_state_keeps_its_step(step):
  state = train_state.TrainState(jnp.int32(step), {}, {}, {}, {})
  assert train_state.frozen_at(state) < 0
  frozen = jax.jit(train_state.freeze)(state)
  assert train_state.frozen_at(frozen) == step
  assert train_state.freeze(frozen).step == frozen.step
