"""Initial weights against what the modules themselves declare."""

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import pytest

from dmdd_jax.models import dmdd
from dmdd_jax.models import initial

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
# Standard deviation of a standard normal number between -2 and 2.
TRUNCATED = 0.87962566


def _abstract(config):
  model = dmdd.from_config(config)
  return model, jax.eval_shape(model.init, jax.random.key(0), IMAGE)


def _names(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize(
  ('trunk', 'head'),
  [
    ('reverse', 'multi_perception'),
    ('encoder_decoder', 'destseg'),
    ('encoder', 'none'),
  ],
)
def test_each_leaf_has_the_distribution_its_module_declares(trunk, head):
  """Against a draw by the modules themselves, with Flax's initialisers."""
  config = model_helpers.tiny_config(student__trunk=trunk, head__kind=head)
  model, abstract = _abstract(config)
  declared = _names(model.lazy_init(jax.random.key(0), IMAGE))
  drawn = _names(initial.draw(abstract, [3]))
  assert declared.keys() == drawn.keys()
  for name, value in drawn.items():
    other = declared[name]
    assert value.dtype == np.float32 and value.shape == other.shape
    if not name.endswith("['kernel']"):
      np.testing.assert_array_equal(value, other)
      continue
    # Seven standard errors of a mean, and of the quotient of two standard
    # deviations.
    assert abs(value.mean()) < 7 * other.std() / np.sqrt(value.size), name
    quotient = np.sqrt(np.mean(value**2) / np.mean(other**2))
    assert abs(np.log(quotient)) < 7 / np.sqrt(value.size), name
    # A truncated draw ends at 2 standard deviations of the normal one.
    if value.size > 2000:
      ends = [
        np.abs(v).max() / v.std() * TRUNCATED < 2.02 for v in (value, other)
      ]
      assert ends[0] == ends[1], name


def test_seed_and_path_decide():
  _, abstract = _abstract(model_helpers.tiny_config())
  first, again, other = (initial.draw(abstract, s) for s in ([1], [1], [2]))
  assert all(model_helpers.leaves_equal(first, again))
  kernels = [
    (a, b)
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(other)
    )
    if path[-1].key == 'kernel'
  ]
  assert all(np.all(a != b) for a, b in kernels)
  # Kernels of one shape differ too.
  teacher = first['params']['teacher']['layer1_0']
  assert np.all(teacher['conv1']['kernel'] != teacher['conv2']['kernel'])
  # Taking parts away changes nothing of the others.
  student = {'params': {'student': abstract['params']['student']}}
  assert all(
    model_helpers.leaves_equal(
      initial.draw(student, [1])['params']['student'],
      first['params']['student'],
    )
  )


def test_a_key_is_the_seed_and_under_a_transformation_flax_draws():
  config = model_helpers.tiny_config()
  model, abstract = _abstract(config)
  variables = dmdd.init(model, jax.random.key(5), 32)
  assert all(
    model_helpers.leaves_equal(variables, initial.draw(abstract, [0, 5]))
  )
  shapes = jax.eval_shape(lambda: dmdd.init(model, jax.random.key(5), 32))
  assert shapes == abstract
