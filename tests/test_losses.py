"""The losses on cases computed by hand, and by numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdd_jax import config as config_lib
from dmdd_jax.models import distance as distance_lib
from dmdd_jax.training import losses

X, Y = np.eye(2, dtype=np.float32)

# Compiled as a whole: one small program instead of one per operation.
cosine_distance = jax.jit(distance_lib.cosine_distance)
flat_cosine_distance = jax.jit(losses.flat_cosine_distance)
ngm = jax.jit(losses.ngm, static_argnames='flat')
aim = jax.jit(losses.aim, static_argnames=('kind', 'margin'))
focal = jax.jit(losses.focal, static_argnames=('gamma', 'alpha'))
dice = jax.jit(losses.dice)
segmentation = jax.jit(losses.segmentation, static_argnames='kind')


@functools.partial(jax.jit, static_argnames='kind')
def segmentation_gradient(logits, mask, kind):
  return jax.value_and_grad(losses.segmentation)(logits, mask, kind)


@jax.jit
def distance_gradients(a, b):
  """Distances of a and b, and their sum's gradients by both."""

  def total(a, b):
    return jnp.sum(distance_lib.cosine_distance(a, b))

  return distance_lib.cosine_distance(a, b), jax.grad(total, (0, 1))(a, b)


def feature(*vectors):
  """One example, one row: vectors (C,) side by side as (1, 1, N, C)."""
  return jnp.asarray(np.stack(vectors)[None, None])


def mask_row(*values):
  return jnp.asarray(values, jnp.float32).reshape(1, 1, -1, 1)


def random_features(seed=0, shapes=((2, 4, 4, 3), (2, 2, 2, 5))):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in shapes]


def numpy_distance(a, b):
  """1 - cos per position in float64, by the definition."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return 1.0 - np.sum(a * b, axis=-1) / norms


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


# --- cosine distance ---------------------------------------------------------


def test_cosine_distance_of_known_angles():
  a = feature(X, X, X, X, 3.0 * X)
  b = feature(X, Y, -X, X + Y, 0.01 * X)
  found = cosine_distance(a, b)
  assert found.shape == (1, 1, 5)
  expected = [0.0, 1.0, 2.0, 1.0 - 1.0 / np.sqrt(2.0), 0.0]
  np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)


def test_cosine_distance_equals_numpy_and_ignores_length():
  (a, _), (b, _) = random_features(0), random_features(1)
  found = cosine_distance(a, b)
  np.testing.assert_allclose(found, numpy_distance(a, b), atol=1e-6)
  np.testing.assert_allclose(
    cosine_distance(1e3 * a, 1e-2 * b), found, atol=1e-6
  )
  np.testing.assert_array_equal(cosine_distance(b, a), found)


@pytest.mark.parametrize('pair', [(0 * X, 0 * X), (0 * X, X), (X, 0 * X)])
def test_zero_vectors_are_at_distance_one_with_finite_gradients(pair):
  a, b = feature(pair[0]), feature(pair[1])
  value, gradients = distance_gradients(a, b)
  assert value.item() == 1.0
  assert np.all(np.isfinite(gradients))


def test_gradients_of_tiny_vectors_are_finite():
  for scale in (1e-4, 1e-8, 1e-20, 1e-38):
    a, b = feature(scale * (X + Y)), feature(100.0 * X)
    value, gradients = distance_gradients(a, b)
    assert np.isfinite(value) and np.all(np.isfinite(gradients)), scale


def test_gradient_equals_the_analytic_one():
  # d(1 - cos)/da = -(b/|b| - cos a/|a|) / |a|.
  (a, _), (b, _) = random_features(2), random_features(3)
  _, (grad, _) = distance_gradients(a, b)
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  norm = np.linalg.norm(a, axis=-1, keepdims=True)
  unit_b = b / np.linalg.norm(b, axis=-1, keepdims=True)
  cosine = np.sum(a * unit_b, axis=-1, keepdims=True) / norm
  expected = -(unit_b - cosine * a / norm) / norm
  np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_distance_is_float32_for_bfloat16_features():
  (a, _), (b, _) = random_features(4), random_features(5)
  a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  found = cosine_distance(a, b)
  assert found.dtype == jnp.float32
  # The sums must not be rounded to bfloat16's 8 bits.
  np.testing.assert_allclose(
    found, numpy_distance(a.astype('f'), b.astype('f')), atol=1e-6
  )


def test_flat_cosine_is_one_angle_over_the_whole_map():
  # (1, 0, 1, 0) and (1, 0, 0, 1) as flat vectors: cos = 1/2. Per position the
  # distances are 0 and 1.
  a, b = feature(X, X), feature(X, Y)
  np.testing.assert_allclose(flat_cosine_distance(a, b), [0.5])
  # A position with long vectors weighs more: cos = 9 / 10.
  np.testing.assert_allclose(
    flat_cosine_distance(feature(3 * X, X), feature(3 * X, Y)),
    [0.1],
    atol=1e-6,
  )
  rows = jnp.concatenate([a, b])
  found = flat_cosine_distance(rows, jnp.concatenate([a, a]))
  np.testing.assert_allclose(found, [0.0, 0.5], atol=1e-6)


# --- masks at feature size ---------------------------------------------------


def brute_force_area(mask, size):
  """Mean over 60 x 60 times finer samples of each cell, for one mask."""
  fine = np.kron(mask, np.ones((60, 60)))
  height, width = (60 * n // s for n, s in zip(mask.shape, size))
  return fine.reshape(size[0], height, size[1], width).mean(axis=(1, 3))


def test_resize_mask_averages_cells():
  mask = np.zeros((1, 4, 4, 1), np.float32)
  mask[0, 0, 0] = mask[0, 2:, 2:] = 1.0
  found = losses.resize_mask(jnp.asarray(mask), (2, 2))
  np.testing.assert_array_equal(found[0, ..., 0], [[0.25, 0.0], [0.0, 1.0]])


def test_resize_mask_where_the_size_does_not_divide():
  # Three pixels over two cells of 1.5 pixels: the middle one is halved.
  mask = jnp.asarray([[0.0, 0.0, 1.0]]).reshape(1, 3, 1, 1)
  np.testing.assert_allclose(
    losses.resize_mask(mask, (2, 1)).ravel(), [0.0, 2.0 / 3.0], atol=1e-6
  )


@pytest.mark.parametrize(
  'shape, size',
  [((8, 4), (2, 2)), ((5, 7), (3, 4)), ((4, 6), (3, 5)), ((3, 2), (5, 4))],
)
def test_resize_mask_is_the_area_average(shape, size):
  rng = np.random.default_rng(0)
  masks = (rng.uniform(size=(3, *shape, 1)) > 0.5).astype(np.float32)
  found = losses.resize_mask(jnp.asarray(masks), size)
  assert found.shape == (3, *size, 1)
  for mask, got in zip(masks, found):
    expected = brute_force_area(mask[..., 0], size)
    np.testing.assert_allclose(got[..., 0], expected, atol=1e-6)
  # Area is neither lost nor made, so no region is too small to be seen.
  np.testing.assert_allclose(
    np.mean(found, axis=(1, 2, 3)), np.mean(masks, axis=(1, 2, 3)), rtol=1e-5
  )


def test_resize_mask_to_its_own_size_changes_nothing():
  mask = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 5, 3, 1)))
  np.testing.assert_array_equal(losses.resize_mask(mask, (5, 3)), mask)


# --- NGM ---------------------------------------------------------------------


def test_ngm_of_known_angles_is_summed_over_levels():
  same = random_features()
  np.testing.assert_allclose(ngm(same, same), 0.0, atol=1e-6)
  opposite = ngm(same, [-f for f in same])
  np.testing.assert_allclose(opposite, 4.0, atol=1e-6)
  orthogonal = ngm([feature(X)] * 3, [feature(Y)] * 3)
  np.testing.assert_allclose(orthogonal, 3.0, atol=1e-6)
  # Level 1: mean(0, 1) = 1/2. Level 2: 2.
  found = ngm([feature(X, X), feature(X)], [feature(X, Y), feature(-X)])
  np.testing.assert_allclose(found, 2.5, atol=1e-6)


def test_ngm_normal_only_counts_normal_positions():
  student, teacher = [feature(X, X, X)], [feature(X, Y, -X)]

  def masked(*values):
    return ngm(student, teacher, [mask_row(*values)])

  np.testing.assert_allclose(masked(0, 0, 1), 0.5, atol=1e-6)
  np.testing.assert_allclose(masked(1, 1, 0), 2.0, atol=1e-6)
  np.testing.assert_allclose(masked(0, 0, 0), ngm(student, teacher), atol=1e-6)
  # A soft mask weighs: (0 * 1 + 1 * 1/2 + 2 * 1/2) / 2.
  np.testing.assert_allclose(masked(0, 0.5, 0.5), 0.75, atol=1e-6)
  assert masked(1, 1, 1) == 0.0


def test_ngm_normal_only_sends_no_gradient_to_anomalous_positions():
  def loss(student, mask):
    return ngm([student], [feature(Y, Y)], [mask])

  student = feature(X, X)
  grad = jax.grad(loss)(student, mask_row(1, 0))
  assert not np.any(grad[0, 0, 0]) and np.any(grad[0, 0, 1])
  # No normal position at all: nothing is pulled and nothing is NaN.
  assert not np.any(jax.grad(loss)(student, mask_row(1, 1)))


def test_flat_ngm_averages_examples_and_sums_levels():
  student = jnp.concatenate([feature(X, X), feature(X, X)])
  teacher = jnp.concatenate([feature(X, Y), feature(X, X)])
  found = ngm([student, student], [teacher, teacher], flat=True)
  np.testing.assert_allclose(found, 2 * (0.5 + 0.0) / 2, atol=1e-6)


def test_flat_ngm_with_masks_is_refused():
  with pytest.raises(ValueError, match='flat'):
    ngm([feature(X)], [feature(X)], [mask_row(0)], flat=True)


# --- AIM ---------------------------------------------------------------------


def test_aim_matches_the_mask():
  same, other = [feature(X, X)], [feature(Y, Y)]
  empty, full = [mask_row(0, 0)], [mask_row(1, 1)]
  # Empty mask: distance 0 asked for. All anomalous: distance 1.
  np.testing.assert_allclose(aim(same, same, empty), 0.0, atol=1e-6)
  np.testing.assert_allclose(aim(other, same, empty), 1.0, atol=1e-6)
  np.testing.assert_allclose(aim(same, same, full), 1.0, atol=1e-6)
  np.testing.assert_allclose(aim(other, same, full), 0.0, atol=1e-6)
  # Bounded: opposite features overshoot the distance of 1 asked for.
  opposite = [feature(-X, -X)]
  np.testing.assert_allclose(aim(opposite, same, full), 1.0, atol=1e-6)
  np.testing.assert_allclose(aim(opposite, same, empty), 2.0, atol=1e-6)
  # Soft: |0 - 1/4| and |1 - 1/4|, two levels alike.
  found = aim(
    [feature(X, X)] * 2, [feature(X, Y)] * 2, [mask_row(0.25, 0.25)] * 2
  )
  np.testing.assert_allclose(found, 2 * (0.25 + 0.75) / 2, atol=1e-6)


def test_aim_margin_counts_anomalous_positions():
  student, teacher = [feature(X, X, X)], [feature(X, Y, -X)]

  def margin_aim(margin, *values):
    return aim(student, teacher, [mask_row(*values)], 'margin', margin)

  # Distances 0, 1, 2; margin 1.5 leaves 1.5, .5, 0.
  np.testing.assert_allclose(margin_aim(1.5, 1, 1, 1), 2.0 / 3.0, atol=1e-6)
  np.testing.assert_allclose(margin_aim(1.5, 1, 1, 0), 1.0, atol=1e-6)
  np.testing.assert_allclose(margin_aim(1.0, 0, 1, 1), 0.0, atol=1e-6)
  # (1.5 * 1 + .5 * .5) / 1.5.
  np.testing.assert_allclose(margin_aim(1.5, 1, 0.5, 0), 1.75 / 1.5, atol=1e-6)
  assert margin_aim(1.5, 0, 0, 0) == 0.0


@pytest.mark.parametrize('value', [0.0, 1.0])
@pytest.mark.parametrize('kind', config_lib.AIM_KINDS)
def test_aim_gradients_are_finite_even_for_dead_features(kind, value):
  features, teacher = random_features(6), random_features(7)
  features = [f.at[:, 0].set(0.0) for f in features]
  masks = [jnp.full((*f.shape[:3], 1), value) for f in features]
  loss = jax.jit(jax.grad(lambda f: losses.aim(f, teacher, masks, kind)))
  grads = loss(features)
  assert all(np.all(np.isfinite(g)) for g in grads)
  if kind == 'margin' and not value:
    assert not any(np.any(g) for g in grads)


@pytest.mark.parametrize('kind', config_lib.AIM_KINDS)
def test_aim_pushes_apart_inside_and_ngm_pulls_together(kind):
  student = feature(X + 0.5 * Y, X + 0.5 * Y)
  teacher, mask = feature(X, X), mask_row(1, 0)

  def distance_after(loss):
    moved = student - 0.01 * jax.grad(loss)(student)
    before = cosine_distance(student, teacher)
    return np.sign(cosine_distance(moved, teacher) - before)[0, 0]

  inside, outside = distance_after(lambda s: aim([s], [teacher], [mask], kind))
  assert inside > 0
  assert outside == (-1 if kind == 'match_mask' else 0)
  pulled = distance_after(lambda s: ngm([s], [teacher]))
  np.testing.assert_array_equal(pulled, [-1, -1])


def test_aim_equals_numpy():
  features, teacher = random_features(8), random_features(9)
  rng = np.random.default_rng(10)
  masks = [rng.uniform(size=(*f.shape[:3], 1)).astype('f') for f in features]
  pairs = [
    (numpy_distance(f, t), m[..., 0])
    for f, t, m in zip(features, teacher, masks)
  ]
  match = sum(np.mean(np.abs(d - m)) for d, m in pairs)
  np.testing.assert_allclose(aim(features, teacher, masks), match, rtol=1e-5)
  hinge = sum(np.sum(m * np.maximum(0, 0.8 - d)) / np.sum(m) for d, m in pairs)
  np.testing.assert_allclose(
    aim(features, teacher, masks, 'margin', 0.8), hinge, rtol=1e-5
  )


def test_unknown_aim_is_refused_with_the_legal_names():
  with pytest.raises(ValueError, match=r"'push'.*match_mask.*margin"):
    aim([feature(X)], [feature(X)], [mask_row(0)], 'push')


# --- segmentation ------------------------------------------------------------


def numpy_focal(logits, mask, gamma, alpha=None):
  """-(1 - p_t)^gamma log p_t, in float64."""
  probability = sigmoid(logits)
  ones = -((1 - probability) ** gamma) * np.log(probability)
  zeros = -(probability**gamma) * np.log(1 - probability)
  if alpha is not None:
    ones, zeros = alpha * ones, (1 - alpha) * zeros
  return np.mean(np.where(np.asarray(mask) > 0.5, ones, zeros))


@pytest.fixture(scope='module')
def logits_and_mask():
  rng = np.random.default_rng(11)
  logits = rng.normal(size=(2, 5, 4, 1), scale=3.0).astype(np.float32)
  mask = (rng.uniform(size=logits.shape) < 0.3).astype(np.float32)
  return jnp.asarray(logits), jnp.asarray(mask)


@pytest.mark.parametrize('gamma, alpha', [(4.0, None), (2.0, 0.25)])
def test_focal_equals_its_formula(gamma, alpha, logits_and_mask):
  # Logit 0 is p = 1/2: 2^-gamma log 2 for either class.
  half = focal(mask_row(0, 0), mask_row(0, 1), gamma)
  np.testing.assert_allclose(half, 2.0**-gamma * np.log(2.0), rtol=1e-6)
  found = focal(*logits_and_mask, gamma, alpha)
  expected = numpy_focal(*logits_and_mask, gamma, alpha)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_focal_alpha_weighs_the_anomalous_class():
  logit = mask_row(0.0)
  quarter = 0.25 * 0.25 * np.log(2.0)
  one = focal(logit, mask_row(1), 2.0, 0.25)
  zero = focal(logit, mask_row(0), 2.0, 0.25)
  np.testing.assert_allclose(one, quarter, rtol=1e-6)
  np.testing.assert_allclose(zero, 3 * quarter, rtol=1e-6)


def test_dice_by_hand():
  # Probabilities 1/2 and 3/4 over the mask (1, 0), smoothed by one pixel:
  # 1 - (2 * 1/2 + 1) / (5/4 + 1 + 1).
  logits = mask_row(0.0, np.log(3.0))
  found = dice(logits, mask_row(1, 0))
  np.testing.assert_allclose(found, 1.0 - 2.0 / 3.25, rtol=1e-6)
  perfect = dice(mask_row(100, -100), mask_row(1, 0))
  np.testing.assert_allclose(perfect, 0.0, atol=1e-6)
  nothing = dice(mask_row(-100, -100), mask_row(0, 0))
  np.testing.assert_allclose(nothing, 0.0, atol=1e-6)


def test_segmentation_losses_are_the_sums_they_say(logits_and_mask):
  logits, mask = logits_and_mask
  probability, target = sigmoid(logits), np.asarray(mask, np.float64)
  l1 = np.mean(np.abs(probability - target))
  overlap = np.sum(probability * target)
  dice = 1 - (2 * overlap + 1) / (np.sum(probability) + np.sum(target) + 1)
  expected = {
    'focal_l1': numpy_focal(logits, mask, 4.0) + l1,
    'focal_dice': numpy_focal(logits, mask, 2.0, 0.25) + dice,
  }
  assert set(expected) == set(config_lib.SEGMENTATION_LOSSES)
  for kind, value in expected.items():
    found = segmentation(logits, mask, kind)
    np.testing.assert_allclose(found, value, rtol=1e-5, err_msg=kind)


@pytest.mark.parametrize('kind', config_lib.SEGMENTATION_LOSSES)
@pytest.mark.parametrize('value', [0.0, 0.3, 1.0])
def test_segmentation_is_finite_for_extreme_logits(kind, value):
  logits = mask_row(-1e4, -100, 0, 100, 1e4)
  mask = jnp.full_like(logits, value)
  loss, grad = segmentation_gradient(logits, mask, kind)
  assert np.isfinite(loss) and np.all(np.isfinite(grad))


@pytest.mark.parametrize('kind', config_lib.SEGMENTATION_LOSSES)
def test_segmentation_gradient_points_to_the_mask(kind):
  logits, mask = mask_row(0, 0, 0, 0, 0), mask_row(1, 0, 0, 0, 1)
  grad = segmentation_gradient(logits, mask, kind)[1].ravel()
  np.testing.assert_array_equal(np.sign(grad), [-1, 1, 1, 1, -1])


def test_unknown_segmentation_loss_is_refused_with_the_legal_names():
  with pytest.raises(ValueError, match=r"'bce'.*focal_l1.*focal_dice"):
    segmentation(mask_row(0), mask_row(0), 'bce')


def test_focused_mean_by_hand():
  distance = jnp.array([[1.0, 3.0]])
  means = [float(losses.focused_mean(distance, f)) for f in (0.0, 1.0, 2.0)]
  np.testing.assert_allclose(means, [2.0, 10 / 4, 28 / 10], rtol=1e-6)
  weighted = losses.focused_mean(distance, 1.0, jnp.array([[1.0, 0.5]]))
  np.testing.assert_allclose(weighted, (1 + 4.5) / (1 + 1.5), rtol=1e-6)
  nothing = losses.focused_mean(distance, 1.0, jnp.zeros((1, 2)))
  np.testing.assert_array_equal(nothing, 0.0)


def test_weights_of_a_focused_mean_are_no_way_to_lower_it():
  gradient = jax.grad(losses.focused_mean)(jnp.array([1.0, 3.0]), 1.0)
  np.testing.assert_allclose(gradient, [0.25, 0.75], rtol=1e-6)
  at_the_goal = jax.grad(losses.focused_mean)(jnp.zeros(2), 1.0)
  assert np.all(np.isfinite(at_the_goal))
