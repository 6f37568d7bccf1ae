"""Muon by Gram matrices against float64 singular values, and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmdd_jax.training import muon


def iterated(matrix):
  """The quintic polynomial, five times on the singular values, in float64."""
  matrix = np.asarray(matrix, np.float64)
  u, values, v = np.linalg.svd(matrix, full_matrices=False)
  values /= np.linalg.norm(values)
  a, b, c = muon.COEFFICIENTS
  for _ in range(muon.ITERATIONS):
    values = a * values + b * values**3 + c * values**5
  return (u * values) @ v


@pytest.mark.parametrize('decades', [0, 3, 8])
@pytest.mark.parametrize('rows, columns', [(288, 32), (32, 64), (48, 48)])
def test_orthogonalize_is_the_polynomial_of_the_singular_values(
  rows, columns, decades
):
  rng = np.random.default_rng(0)
  count = min(rows, columns)
  values = 10.0 ** np.linspace(0.0, -decades, count)
  matrix = rng.normal(size=(rows, count)) * values
  matrix = np.float32(matrix @ rng.normal(size=(count, columns)))
  updates = jax.jit(muon.orthogonalize)(matrix)
  expected = iterated(matrix)
  error = np.linalg.norm(updates - expected) / np.linalg.norm(expected)
  assert error < 2e-3
  assert np.linalg.norm(updates, ord=2) < 1.25


def test_nothing_to_orthogonalize_stays_nothing():
  assert not np.any(muon.orthogonalize(jnp.zeros((3, 3, 2, 4))))


def test_a_kernel_is_a_matrix_of_its_outputs_columns():
  kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 8))
  updates = muon.orthogonalize(jnp.asarray(kernel, jnp.float32))
  assert updates.shape == kernel.shape
  expected = iterated(kernel.reshape(36, 8)).reshape(kernel.shape)
  np.testing.assert_allclose(updates, expected, atol=1e-4)


@pytest.mark.parametrize('devices', [1, 3, 8, 32])
def test_every_kernel_has_one_device_and_none_works_much_longer(devices):
  shapes = [(3, 3, 64, 64)] * 8 + [(1, 1, 512, 256), (3, 3, 256, 512), (7, 1)]
  owned = muon.assign(shapes, devices)
  assert len(owned) == devices
  assert sorted(i for own in owned for i in own) == list(range(len(shapes)))
  work = [sum(muon.operations(shapes[i]) for i in own) for own in owned]
  largest = max(map(muon.operations, shapes))
  assert max(work) <= sum(work) / devices + largest


def test_operations_are_those_of_the_products():
  """By hand, of 5 x 3: M'M and the last product; 17 products of 3 x 3."""
  expected = 2 * (2 * 3 * 3 * 5) + 17 * (2 * 3 * 3 * 3)
  assert muon.operations((5, 1, 1, 3)) == expected
  assert muon.operations((1, 1, 3, 5)) == expected


def test_the_updates_and_the_state_are_those_of_optax():
  rng = np.random.default_rng(0)
  params = {
    'tall': rng.normal(size=(3, 3, 8, 16)),
    'wide': rng.normal(size=(1, 1, 8, 32)),
    'scale': rng.normal(size=(16,)),
  }
  params = jax.tree.map(np.float32, params)
  rate = optax.linear_schedule(0.02, 0.01, 4)
  kernel = optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
  theirs = optax.contrib.muon(
    rate,
    weight_decay=0.1,
    adam_b1=0.5,
    adam_b2=0.999,
    adam_learning_rate=5e-3,
    muon_weight_dimension_numbers=lambda tree: jax.tree.map(
      lambda x: kernel if x.ndim == 4 else None, tree
    ),
  )
  ours = muon.muon(
    rate, optax.adamw(5e-3, b1=0.5, weight_decay=0.0, nesterov=True), 0.1
  )
  states = theirs.init(params), ours.init(params)
  for _ in range(3):
    gradient = jax.tree.map(
      lambda x: np.float32(rng.normal(size=x.shape)), params
    )
    expected, their_state = theirs.update(gradient, states[0], params)
    updates, our_state = ours.update(gradient, states[1], params)
    states = their_state, our_state
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      updates,
      expected,
    )
  # Checkpoints name arrays by these keys.
  theirs, ours = (jax.tree.leaves_with_path(state) for state in states)
  for (their_key, expected), (our_key, value) in zip(theirs, ours, strict=True):
    assert our_key == their_key
    np.testing.assert_allclose(value, expected, rtol=1e-6)
