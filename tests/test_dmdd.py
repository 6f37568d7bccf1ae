"""The whole model: maps by hand, gradients that must be zero, dtypes."""

import functools

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import pytest

from dmdd_jax.models import distance as distance_lib
from dmdd_jax.models import dmdd
from dmdd_jax.models import segmentation
from dmdd_jax.models import student as student_lib
from dmdd_jax.training import losses

X, Y = np.eye(2, dtype=np.float32)


def constant(vector, side):
  """(1, side, side, C), the same vector everywhere."""
  return jnp.broadcast_to(jnp.asarray(vector), (1, side, side, len(vector)))


# --- maps of hand-made features ----------------------------------------------


def test_distance_maps_are_normality_levels_then_abnormality_levels():
  taps = [constant(X, 4), constant(X, 2)]
  normality = [constant(X, 4), constant(Y, 2)]
  abnormality = [constant(-X, 4), constant(X + Y, 2)]
  maps = dmdd.distance_maps([normality, abnormality], taps)
  assert maps.shape == (1, 4, 4, 4) and maps.dtype == jnp.float32
  expected = [0.0, 1.0, 2.0, 1.0 - 1.0 / np.sqrt(2.0)]
  np.testing.assert_allclose(
    maps, np.broadcast_to(expected, maps.shape), atol=1e-6
  )


def test_distance_maps_are_interpolated_from_their_own_level():
  """Distances are upsampled, not features; half-pixel centres."""
  tap = constant(X, 2)
  coarse = tap.at[:, :, 1].set(jnp.asarray(Y))
  fine = constant(X, 4)
  maps = dmdd.distance_maps([[fine, coarse], [fine, tap]], [fine, tap])
  row = [0.0, 0.25, 0.75, 1.0]
  np.testing.assert_allclose(maps[0, ..., 1], [row] * 4, atol=1e-6)
  for other in (0, 2, 3):
    np.testing.assert_allclose(maps[0, ..., other], 0.0, atol=1e-6)


def test_the_border_of_the_maps_is_that_of_their_inside():
  rng = np.random.default_rng(0)
  features = [jnp.float32(rng.normal(size=(2, 8, 8, 3))) for _ in range(3)]
  normality, abnormality, taps = ([feature] for feature in features)
  maps = np.asarray(dmdd.distance_maps([normality, abnormality], taps))
  found = np.asarray(dmdd.distance_maps([normality, abnormality], taps, 2))
  inner = np.clip(np.arange(8), 2, 5)
  np.testing.assert_array_equal(found, maps[:, inner][:, :, inner])


def test_distance_maps_are_float32_for_bfloat16_features():
  feature = constant(X, 2).astype(jnp.bfloat16)
  maps = dmdd.distance_maps([[feature], [feature]], [feature])
  assert maps.dtype == jnp.float32


def test_feature_products_sum_to_the_cosine():
  rng = np.random.default_rng(0)

  def draw():
    shapes = ((2, 4, 4, 3), (2, 4, 4, 5))
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]

  normality, abnormality, taps = draw(), draw(), draw()
  products = dmdd.feature_products([normality, abnormality], taps)
  assert products.shape == (2, 4, 4, 3 + 5 + 3 + 5)
  levels = np.split(np.asarray(products), [3, 8, 11], axis=-1)
  pairs = [*zip(normality, taps), *zip(abnormality, taps)]
  for product, (feature, tap) in zip(levels, pairs):
    distance = distance_lib.cosine_distance(feature, tap)
    np.testing.assert_allclose(product.sum(-1), 1.0 - distance, atol=1e-5)


def test_feature_products_by_hand():
  feature, tap = constant([3.0, 4.0], 2), constant([0.0, 2.0], 2)
  products = dmdd.feature_products([[feature], [tap]], [tap])
  expected = [0.0, 0.8, 0.0, 1.0]
  np.testing.assert_allclose(
    products, np.broadcast_to(expected, products.shape), atol=1e-6
  )
  nothing = dmdd.feature_products([[0 * feature], [tap]], [tap])
  np.testing.assert_allclose(nothing[..., :2], 0.0)


# --- the model of a config ---------------------------------------------------


def abstract_variables(model, size=64):
  return jax.eval_shape(lambda: dmdd.init(model, jax.random.key(0), size))


@pytest.mark.parametrize('kind', segmentation.KINDS)
def test_variables_have_the_parts_that_are_trained(kind):
  config = model_helpers.tiny_config(head__kind=kind)
  variables = abstract_variables(dmdd.from_config(config))
  parts = {'teacher', 'student'} | ({'head'} if kind != 'none' else set())
  assert set(variables) == {'params', 'batch_stats'}
  assert set(variables['params']) == parts
  assert set(variables['batch_stats']) == parts | {'position'}
  # ResNet-18 without its last stage (8 393 728 parameters) and fc (513 000).
  last_stage = 3 * 9 * 512**2 + 9 * 256 * 512 + 256 * 512 + 5 * 2 * 512
  assert last_stage == 8_393_728
  assert model_helpers.count(variables['params']['teacher']) == (
    11_689_512 - 513_000 - last_stage
  )


def test_every_field_of_student_and_head_reaches_its_module():
  config = model_helpers.tiny_config(
    student__extra_convs=1,
    student__stop_abnormality_gradient=True,
    head__width=6,
    head__dilations=(1, 3, 5),
    head__channel_attention=False,
  )
  model = dmdd.from_config(config)
  params = abstract_variables(model)['params']
  assert 'normality_1' in params['student']['decouple1']
  perceptions = set(params['head']['perceptions'])
  assert perceptions == {'dilated1', 'dilated3', 'dilated5', 'global'}
  assert params['head']['logit']['kernel'].shape == (1, 1, 6, 1)
  assert 'channel_attention' not in params['head']
  assert 'spatial_attention' in params['head']


@pytest.mark.parametrize(
  'kind, head_input, channels',
  [
    ('multi_perception', 'maps', 6),
    ('multi_perception', 'products', 2 * (64 + 128 + 256)),
    ('destseg', 'maps', 6),
    ('destseg', 'products', 2 * (64 + 128 + 256)),
  ],
)
def test_input_channels_of_the_head(kind, head_input, channels):
  config = model_helpers.tiny_config(head__kind=kind, head__input=head_input)
  head = abstract_variables(dmdd.from_config(config))['params']['head']
  first = head['stem']['conv'] if kind != 'destseg' else head['res_0']['conv1']
  assert first['kernel'].shape == (3, 3, channels, 4)


@pytest.mark.parametrize(
  'kind, trunk, size',
  [
    ('multi_perception', 'encoder_decoder', (64, 64)),
    ('multi_perception', 'reverse', (32, 96)),
    ('destseg', 'encoder', (96, 32)),
    ('none', 'encoder', (72, 40)),
  ],
)
def test_output_shapes(kind, trunk, size):
  model = dmdd.from_config(
    model_helpers.tiny_config(head__kind=kind, student__trunk=trunk)
  )
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  output, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  height, width = size[0] // 4, size[1] // 4
  assert output.maps.shape == (2, height, width, 6)
  assert output.maps_mean.shape == output.logit.shape == (2, height, width)


@pytest.mark.parametrize('share', [0.0, 0.5, 0.8, 1.0])
def test_the_distance_weighs_the_branches(share):
  images = jnp.asarray(model_helpers.make_batch(batch=1)['image'])
  options = {'head__kind': 'none', 'head__normality_share': share}
  model = dmdd.from_config(model_helpers.tiny_config(**options))
  variables = model_helpers.make_variables(model)
  output = model.apply(variables, images)
  maps = np.asarray(output.maps)
  normal, abnormal = maps[..., :3].mean(-1), maps[..., 3:].mean(-1)
  bias = variables['batch_stats']['position']['bias']
  expected = share * normal + (1 - share) * abnormal - bias
  np.testing.assert_allclose(output.distance, expected, atol=1e-6)
  np.testing.assert_array_equal(output.logit, output.distance)
  np.testing.assert_allclose(output.maps_mean, maps.mean(-1), atol=1e-6)


def test_maps_are_of_the_branches_that_are_trained():
  images = jnp.asarray(model_helpers.make_batch(batch=1)['image'])
  both = dmdd.from_config(model_helpers.tiny_config(head__kind='none'))
  variables = model_helpers.make_variables(both)
  maps = both.apply(variables, images).maps
  for weight, part in (('aim', maps[..., :3]), ('ngm', maps[..., 3:])):
    options = {'head__kind': 'none', f'loss__{weight}_weight': 0.0}
    one = dmdd.from_config(model_helpers.tiny_config(**options))
    output = one.apply(variables, images)
    np.testing.assert_array_equal(output.maps, part)
    np.testing.assert_array_equal(output.maps_mean, part.mean(axis=-1))
    config = model_helpers.tiny_config(head__untrained_maps=True, **options)
    np.testing.assert_array_equal(
      dmdd.from_config(config).apply(variables, images).maps, maps
    )


# --- gradients that must be zero ---------------------------------------------


def is_zero(tree):
  return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def gradients_of(model, variables, objective, parts):
  """Of objective(model, variables, features, taps) by the parameters of
  `parts`. What is not asked for is not compiled, and zeros cost nothing."""
  images = jnp.asarray(model_helpers.make_batch(batch=2)['image'])

  @jax.jit
  @jax.grad
  def gradient(trained, params, batch_stats, images):
    variables = {
      'params': {**params, **trained},
      'batch_stats': batch_stats,
    }
    taps = model.apply(variables, images, method='teach')
    features = model.apply(variables, images, taps, method='study')
    return objective(model, variables, features, taps)

  params = variables['params']
  trained = {part: params[part] for part in parts}
  return gradient(trained, params, variables['batch_stats'], images)


def segmentation_objective(model, variables, features, taps):
  output = model.apply(variables, *features, taps, method='segment')
  mask = jnp.zeros_like(output.logit).at[:, :4].set(1.0)
  return losses.segmentation(output.logit, mask)


def distance_objective(model, variables, features, taps):
  """The features against the teacher: what NGM and AIM are made of."""
  masks = [jnp.ones((*tap.shape[:3], 1)) for tap in taps]
  return losses.ngm(features[0], taps) + losses.aim(features[1], taps, masks)


def everything_objective(*arguments):
  return segmentation_objective(*arguments) + distance_objective(*arguments)


@functools.cache
def model_and_variables(**changes):
  model = dmdd.from_config(model_helpers.tiny_config(**changes))
  return model, model_helpers.make_variables(model)


@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_the_teacher_gets_no_gradient(trunk):
  made = model_and_variables(student__trunk=trunk)
  assert is_zero(gradients_of(*made, everything_objective, ['teacher']))


@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_the_student_gets_no_gradient_from_segmentation(trunk):
  made = model_and_variables(student__trunk=trunk)
  assert is_zero(gradients_of(*made, segmentation_objective, ['student']))


def test_the_student_gets_no_gradient_through_products():
  made = model_and_variables(head__input='products', student__trunk='encoder')
  assert is_zero(gradients_of(*made, segmentation_objective, ['student']))


def test_segmentation_trains_all_of_the_head():
  parts = ('teacher', 'student', 'head')
  made = model_and_variables(student__trunk='encoder')
  gradients = gradients_of(*made, segmentation_objective, parts)
  assert is_zero(gradients['teacher']) and is_zero(gradients['student'])
  for name, leaves in gradients['head'].items():
    assert not is_zero(leaves), name


def test_stopped_aim_leaves_the_trunk_to_ngm():
  made = model_and_variables(student__stop_abnormality_gradient=True)

  def aim(model, variables, features, taps):
    masks = [jnp.ones((*tap.shape[:3], 1)) for tap in taps]
    return losses.aim(features[1], taps, masks)

  gradients = gradients_of(*made, aim, ['student', 'head'])
  assert is_zero(gradients['head'])
  assert is_zero(gradients['student']['encoder'])
  for level in (1, 2, 3):
    for name, leaves in gradients['student'][f'decouple{level}'].items():
      assert is_zero(leaves) == name.startswith('normality'), name


# --- values ------------------------------------------------------------------


@functools.cache
def reference():
  """(jitted apply, variables, images, output) in float32."""
  model, variables = model_and_variables(
    student__trunk='encoder', head__position_bias=False
  )
  images = jnp.asarray(model_helpers.make_batch(batch=3)['image'])
  apply = jax.jit(model.apply)
  return apply, variables, images, apply(variables, images)


def test_output_is_made_of_its_maps():
  _, _, _, output = reference()
  assert np.all(output.maps > -1e-5)
  # Features after a ReLU are at most orthogonal.
  assert np.all(output.maps < 1.0 + 1e-5)
  np.testing.assert_allclose(
    output.maps_mean, np.mean(output.maps, axis=-1), atol=1e-6
  )
  assert np.std(output.logit) > 0.0


def test_rows_do_not_look_at_each_other():
  apply, variables, images, output = reference()
  turned = apply(variables, images[::-1])
  for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(turned)):
    np.testing.assert_allclose(a, b[::-1], atol=1e-5)


def test_without_a_head_the_logit_is_the_distance():
  options = {'head__kind': 'none', 'head__position_bias': False}
  model = dmdd.from_config(model_helpers.tiny_config(**options))
  taps = [constant(X, 4), constant(X, 2)]
  other = [constant(Y, 4), constant(X, 2)]
  output = model.apply({}, taps, other, taps, method='segment')
  np.testing.assert_allclose(output.maps_mean, 0.25, atol=1e-6)
  np.testing.assert_array_equal(output.logit, output.distance)


def test_bfloat16_gives_float32_maps_near_the_float32_ones():
  _, variables, images, output = reference()
  options = {'dtype': 'bfloat16', 'head__position_bias': False}
  model = dmdd.from_config(model_helpers.tiny_config(**options))
  dtypes = {
    leaf.dtype for leaf in jax.tree.leaves(abstract_variables(model, 32))
  }
  assert dtypes == {jnp.dtype('float32')}
  found = jax.jit(model.apply)(variables, images)
  for name in ('maps', 'maps_mean', 'logit'):
    assert getattr(found, name).dtype == jnp.float32
  # 8 bits of mantissa through a dozen layers.
  np.testing.assert_allclose(found.maps, output.maps, atol=0.01)
  np.testing.assert_allclose(found.maps_mean, output.maps_mean, atol=0.005)
  np.testing.assert_allclose(found.logit, output.logit, atol=0.01)
  # It is another computation, not the same one renamed.
  assert np.any(np.asarray(found.maps) != np.asarray(output.maps))
