"""The second trunk, on a smaller copy of the image (`student.context`)."""

import functools
import json

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import pytest
import test_student

from configs import default
from dmdd_jax import config as config_lib
from dmdd_jax.models import dmdd
from dmdd_jax.models import student as student_lib
from dmdd_jax.training import checkpoint
from dmdd_jax.training import losses

FIELDS = (
  ('student', 'context'),
  ('student', 'context_width'),
  ('head', 'context_share'),
  ('head', 'context_fusion'),
)


def make_model(**changes):
  changes = {'student__context': 2, 'student__context_width': 64} | changes
  return dmdd.from_config(model_helpers.tiny_config(**changes))


def before(config):
  """The config as it was written before there was a second trunk."""
  for part, field in FIELDS:
    del config[part][field]
  return config


def abstract_variables(model, size=64):
  return jax.eval_shape(lambda: dmdd.init(model, jax.random.key(0), size))


# --- shapes and parameters ---------------------------------------------------


@pytest.mark.parametrize('width', [512, 64])
def test_parameter_count(width):
  student = abstract_variables(make_model(student__context_width=width))
  student = student['params']['student']
  block, conv_bn = test_student.block, test_student.conv_bn
  bottleneck = conv_bn(3, 64, 256) + conv_bn(3, 256, 256) + conv_bn(3, 128, 256)
  bottleneck += block(768, width, 2) + block(width, width)
  decoder = block(width, 256, 1 + (width == 256)) + block(256, 256)
  decoder += sum(block(a, b) + block(b, b) for a, b in ((256, 128), (128, 64)))
  assert model_helpers.count(student['context_bottleneck']) == bottleneck
  assert model_helpers.count(student['context_decoder']) == decoder
  assert model_helpers.count(student) == (
    test_student.encoder_count(3)
    + bottleneck
    + decoder
    + 2 * test_student.decouple_count()
  )


@pytest.mark.parametrize('context', [2, 4])
@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_shapes(trunk, context):
  model = make_model(student__trunk=trunk, student__context=context)
  images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)

  def run(images):
    variables = dmdd.init(model, jax.random.key(0), 64)
    del variables['batch_stats']['position']  # Of a square image.
    taps = model.apply(variables, images, method='teach')
    features = model.apply(variables, images, taps, method='study')
    return taps, *features

  taps, normality, abnormality = jax.eval_shape(run, images)
  expected = test_student.tap_shapes(64, 96)
  expected += test_student.tap_shapes(64 // context, 96 // context)
  for levels in (taps, normality, abnormality):
    assert [level.shape for level in levels] == expected


@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
@pytest.mark.parametrize('context', [0, 2])
def test_a_trunk_without_the_coarsest_level(trunk, context):
  changes = {'student__trunk': trunk, 'student__context': context}
  model = make_model(student__levels=2, **changes)
  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  output, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), images
  )
  levels = 2 + 3 * bool(context)
  assert output.maps.shape == (2, 16, 16, 2 * levels)
  student = variables['params']['student']
  splits = [name for name in student if name.startswith('decouple')]
  assert len(splits) == levels
  if trunk == 'encoder':
    assert 'layer3_0' not in student['encoder']
    assert 'layer2_1' in student['encoder']


def test_there_is_a_map_for_each_level_of_both_trunks():
  model = make_model()
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  output, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), images
  )
  assert output.maps.shape == (2, 8, 8, 12)
  stem = variables['params']['head']['stem']['conv']['kernel']
  assert stem.shape == (3, 3, 12, 4)


# --- values ------------------------------------------------------------------


@functools.cache
def model_and_variables(**changes):
  model = make_model(**changes)
  return model, model_helpers.make_variables(model)


def test_shrink_averages_squares():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_allclose(
    student_lib.shrink(x, 2)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]]
  )
  np.testing.assert_allclose(student_lib.shrink(x, 4).ravel(), [7.5])


def test_the_teacher_sees_the_image_and_its_smaller_copy():
  model, variables = model_and_variables()
  small = np.random.default_rng(0).uniform(size=(1, 32, 32, 3))
  small = small.astype(np.float32)
  large = small.repeat(2, axis=1).repeat(2, axis=2)
  alone = dmdd.from_config(model_helpers.tiny_config())
  teach = functools.partial(alone.apply, variables, method='teach')
  taps = model.apply(variables, large, method='teach')
  for found, expected in zip(taps, (*teach(large), *teach(small)), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'fusion, power', [('mean', 1), ('root_mean_square', 2)]
)
@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('levels', [2, 3])
def test_the_distance_weighs_trunks_and_branches(levels, share, fusion, power):
  changes = {'head__context_share': share, 'head__context_fusion': fusion}
  changes |= {'head__kind': 'none', 'student__levels': levels}
  model = make_model(head__normality_share=0.9, **changes)
  _, variables = model_and_variables(student__levels=levels)
  images = jnp.asarray(model_helpers.make_batch(batch=1)['image'])
  output = model.apply(variables, images)
  maps = np.asarray(output.maps, np.float64).reshape(1, 8, 8, 2, levels + 3)
  trunks = maps[..., :levels].mean(-1), maps[..., levels:].mean(-1)
  maps = np.stack(trunks, axis=-1) ** power
  branches = (1 - share) * maps[..., 0] + share * maps[..., 1]
  branches **= 1 / power
  expected = 0.9 * branches[..., 0] + 0.1 * branches[..., 1]
  expected -= variables['batch_stats']['position']['bias']
  np.testing.assert_allclose(output.distance, expected, atol=1e-5)
  np.testing.assert_allclose(
    output.maps_mean, np.mean(output.maps, axis=-1), atol=1e-6
  )


def test_of_one_branch_the_trunks_are_weighed_too():
  changes = {'head__kind': 'none', 'loss__aim_weight': 0.0}
  changes['head__context_fusion'] = 'mean'
  model = make_model(head__context_share=0.25, **changes)
  _, variables = model_and_variables()
  images = jnp.asarray(model_helpers.make_batch(batch=1)['image'])
  output = model.apply(variables, images)
  maps = np.asarray(output.maps, np.float64)
  expected = 0.75 * maps[..., :3].mean(-1) + 0.25 * maps[..., 3:].mean(-1)
  expected -= variables['batch_stats']['position']['bias']
  np.testing.assert_allclose(output.distance, expected, atol=1e-5)


@pytest.mark.parametrize(
  'trunk, levels', [('encoder', range(3)), ('context', range(3, 6))]
)
def test_each_trunk_is_trained_by_its_own_levels(trunk, levels):
  model, variables = model_and_variables()
  images = jnp.asarray(model_helpers.make_batch(batch=2)['image'])
  params, stats = variables['params'], variables['batch_stats']

  @jax.jit
  @jax.grad
  def gradient(student, params, stats):
    trained = {'params': {**params, 'student': student}, 'batch_stats': stats}
    taps = model.apply(trained, images, method='teach')
    features = model.apply(trained, images, taps, method='study')[0]
    return losses.ngm([features[i] for i in levels], [taps[i] for i in levels])

  found = gradient(params['student'], params, stats)
  reached = {
    name
    for name, leaves in found.items()
    if any(np.any(leaf) for leaf in jax.tree.leaves(leaves))
  }
  modules = {
    'encoder': {'encoder'},
    'context': {'context_bottleneck', 'context_decoder'},
  }[trunk]
  assert reached == modules | {f'decouple{level + 1}' for level in levels}


# --- configs and checkpoints of before ---------------------------------------


@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_an_older_config_builds_the_same_model(trunk):
  changes = {'student__trunk': trunk, 'student__context': 0}
  now = dmdd.from_config(model_helpers.tiny_config(**changes))
  stored = before(model_helpers.tiny_config(**changes)).to_dict()
  old = dmdd.from_config(config_lib.upgrade(stored))
  variables = model_helpers.make_variables(old)
  shapes = jax.tree.map(jnp.shape, variables)
  assert shapes == jax.tree.map(jnp.shape, abstract_variables(now, 32))
  assert not any(
    name.startswith('context') for name in variables['params']['student']
  )
  images = jnp.asarray(model_helpers.make_batch(batch=1)['image'])
  equal = model_helpers.leaves_equal(
    *(model.apply(variables, images) for model in (old, now))
  )
  assert all(equal)


def test_an_older_checkpoint_goes_on_without_and_not_with_a_second_trunk():
  found = json.loads(json.dumps(before(default.get_config()).to_dict()))
  config = default.get_config()
  config.student.context = 0
  checkpoint.check_config('here', found, config)
  config.student.context_width += 1  # Without meaning, as there is none.
  checkpoint.check_config('here', found, config)
  config.student.context = 2
  with pytest.raises(checkpoint.CheckpointError, match='student.context'):
    checkpoint.check_config('here', found, config)
