"""The student: shapes, parameter counts by formula, and where gradients go."""

import functools

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import pytest

from dmdd_jax.models import resnet
from dmdd_jax.models import student as student_lib

CHANNELS = (64, 128, 256)


def tap_shapes(height, width, batch=2):
  """Strides 4, 8, 16, each halving rounded up, as torchvision's."""
  shapes = []
  for stride, channels in zip((4, 8, 16), CHANNELS):
    size = (-(-height // stride), -(-width // stride))
    shapes.append((batch, *size, channels))
  return shapes


def abstract_init(student, height=64, width=64):
  """Shapes of the variables and outputs; nothing is computed."""
  images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
  taps = [
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in tap_shapes(height, width)
  ]
  init = functools.partial(student.init_with_output, train=False)
  return jax.eval_shape(init, jax.random.key(0), images, taps)


# --- parameter counts, by hand -----------------------------------------------


def conv_bn(kernel, inputs, outputs):
  """A bias-free convolution and its batch norm's scale and bias."""
  return kernel**2 * inputs * outputs + 2 * outputs


def block(inputs, outputs, stride=1):
  total = conv_bn(3, inputs, outputs) + conv_bn(3, outputs, outputs)
  if inputs != outputs or stride != 1:
    total += conv_bn(1, inputs, outputs)
  return total


def encoder_count(stages):
  """ResNet-18's stem and stages of two blocks."""
  total, inputs = conv_bn(7, 3, 64), 64
  for stage in range(stages):
    outputs = 64 * 2**stage
    total += block(inputs, outputs, 1 + (stage > 0)) + block(outputs, outputs)
    inputs = outputs
  return total


def decoder_count():
  """From 512 channels to 256, 128, 64, two blocks each."""
  pairs = ((512, 256), (256, 128), (128, 64))
  return sum(block(a, b) + block(b, b) for a, b in pairs)


def bottleneck_count():
  """RD4AD's: 64 -> 256 -> 256, 128 -> 256, then 3 * 256 -> 512 twice."""
  fuse = conv_bn(3, 64, 256) + conv_bn(3, 256, 256) + conv_bn(3, 128, 256)
  return fuse + block(768, 512, 2) + block(512, 512)


def decouple_count(extra_convs=0):
  """Two branches of 1x1 convolutions per level."""
  return sum(2 * (1 + extra_convs) * conv_bn(1, c, c) for c in CHANNELS)


TRUNK_COUNTS = {
  'encoder_decoder': encoder_count(4) + 2 * block(512, 512) + decoder_count(),
  'reverse': bottleneck_count() + decoder_count(),
  'encoder': encoder_count(3),
}


def test_formula_agrees_with_torchvision():
  # resnet18 has 11 689 512 parameters, 513 000 of them in fc.
  assert encoder_count(4) == 11_689_512 - 513_000


@pytest.mark.parametrize('extra_convs', [0, 2])
@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_parameter_count(trunk, extra_convs):
  student = student_lib.Student('resnet18', trunk, extra_convs)
  _, variables = abstract_init(student)
  expected = TRUNK_COUNTS[trunk] + decouple_count(extra_convs)
  assert model_helpers.count(variables['params']) == expected


def test_branches_have_equal_capacity():
  _, variables = abstract_init(student_lib.Student('resnet18', 'encoder', 1))
  for level, channels in enumerate(CHANNELS, 1):
    params = variables['params'][f'decouple{level}']
    sizes = {'normality': 0, 'abnormality': 0}
    for name, leaves in params.items():
      sizes[name.split('_')[0]] += model_helpers.count(leaves)
    assert set(sizes.values()) == {2 * conv_bn(1, channels, channels)}


# --- shapes ------------------------------------------------------------------


@pytest.mark.parametrize('size', [(64, 64), (32, 96), (96, 32), (72, 104)])
@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_features_have_the_shapes_of_the_taps(trunk, size):
  student = student_lib.Student('resnet18', trunk)
  (normality, abnormality), _ = abstract_init(student, *size)
  expected = tap_shapes(*size)
  assert [f.shape for f in normality] == expected
  assert [f.shape for f in abnormality] == expected


@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_features_have_the_shapes_of_a_bottleneck_teachers_taps(trunk):
  images = jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32)
  teacher = resnet.ResNet('wide_resnet50_2')
  taps, _ = jax.eval_shape(teacher.init_with_output, jax.random.key(0), images)
  student = student_lib.Student('wide_resnet50_2', trunk)
  (normality, abnormality), _ = jax.eval_shape(
    student.init_with_output, jax.random.key(0), images, taps
  )
  assert [f.shape for f in normality] == [t.shape for t in taps]
  assert [f.shape for f in abnormality] == [t.shape for t in taps]


def test_unknown_trunk_is_refused_with_the_legal_names():
  with pytest.raises(ValueError, match="'unet'.*encoder_decoder.*reverse"):
    abstract_init(student_lib.Student('resnet18', 'unet'))


def test_resize_bilinear_has_half_pixel_centres():
  row = jnp.asarray([0.0, 4.0]).reshape(1, 1, 2, 1)
  up = student_lib.resize_bilinear(row, (1, 4))
  np.testing.assert_allclose(up.ravel(), [0.0, 1.0, 3.0, 4.0], atol=1e-6)
  down = student_lib.resize_bilinear(
    jnp.arange(4.0).reshape(1, 1, 4, 1), (1, 2)
  )
  np.testing.assert_allclose(down.ravel(), [0.5, 2.5], atol=1e-6)


# --- behaviour ---------------------------------------------------------------


def random_inputs(height=32, width=32, batch=2):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(batch, height, width, 3))
  taps = [rng.uniform(size=s) for s in tap_shapes(height, width, batch)]
  return jnp.asarray(images, 'f'), [jnp.asarray(t, 'f') for t in taps]


class OneLevel:
  """`Decouple` on a small feature and the squared size of each branch."""

  def __init__(self, **kwargs):
    self.module = student_lib.Decouple(**kwargs)
    self.feature = jnp.asarray(
      np.random.default_rng(1).normal(size=(2, 3, 3, 4)), jnp.float32
    )
    self.variables = self.module.init(jax.random.key(0), self.feature)

  def gradient(self, branch):
    """Of the sum of one branch's squares: by the feature, by the params."""

    def loss(feature, params):
      variables = {**self.variables, 'params': params}
      return jnp.sum(jnp.square(self.module.apply(variables, feature)[branch]))

    both = jax.jit(jax.grad(loss, (0, 1)))
    return both(self.feature, self.variables['params'])


def test_decouple_equals_numpy():
  level = OneLevel()
  params = level.variables['params']
  found = level.module.apply(level.variables, level.feature)
  for name, got in zip(('normality', 'abnormality'), found):
    kernel = np.asarray(params[f'{name}_0']['kernel'], np.float64)[0, 0]
    # Batch norm at its initial statistics divides by sqrt(1 + 1e-5).
    expected = np.asarray(level.feature) @ kernel / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(got, np.maximum(expected, 0), atol=1e-5)
  assert np.any(np.asarray(found[0]) != np.asarray(found[1]))


@pytest.mark.parametrize('extra_convs', [0, 1])
@pytest.mark.parametrize('stopped', [False, True])
def test_stop_abnormality_gradient(stopped, extra_convs):
  level = OneLevel(stop_abnormality_gradient=stopped, extra_convs=extra_convs)
  for branch, name in enumerate(('normality', 'abnormality')):
    by_feature, by_params = level.gradient(branch)
    reaches_trunk = not (stopped and name == 'abnormality')
    assert np.any(by_feature) == reaches_trunk
    for key, leaves in by_params.items():
      # Each branch trains itself and never the other.
      trained = any(np.any(leaf) for leaf in jax.tree.leaves(leaves))
      assert trained == key.startswith(f'{name}_'), (name, key)


def test_stop_abnormality_gradient_changes_no_value():
  level = OneLevel(extra_convs=1)
  stopped = student_lib.Decouple(extra_convs=1, stop_abnormality_gradient=True)
  for a, b in zip(
    level.module.apply(level.variables, level.feature),
    stopped.apply(level.variables, level.feature),
  ):
    np.testing.assert_array_equal(a, b)


@functools.cache
def run(trunk):
  """(images, taps) -> normality and abnormality features, in training."""
  student = student_lib.Student('resnet18', trunk)
  _, abstract = abstract_init(student, 32, 32)
  variables = model_helpers.fill(abstract)

  # A weight that the function closed over would be compiled into it.
  @jax.jit
  def apply(variables, images, taps):
    return student.apply(variables, images, taps, True, mutable='batch_stats')

  return lambda *inputs: apply(variables, *inputs)[0]


@pytest.mark.parametrize('trunk', student_lib.TRUNKS)
def test_only_the_reverse_trunk_looks_at_the_teacher(trunk):
  images, taps = random_inputs()
  outputs = {
    'reference': run(trunk)(images, taps),
    'images': run(trunk)(images[:, ::-1], taps),
    'taps': run(trunk)(images, [2.0 - tap for tap in taps]),
  }
  looks_at = {
    name: any(
      np.any(np.asarray(a) != np.asarray(b))
      for a, b in zip(
        jax.tree.leaves(outputs['reference']), jax.tree.leaves(outputs[name])
      )
    )
    for name in ('images', 'taps')
  }
  assert looks_at == {'images': trunk != 'reverse', 'taps': trunk == 'reverse'}
  for feature in jax.tree.leaves(outputs['reference']):
    assert np.all(np.isfinite(feature)) and np.all(feature >= 0.0)


def test_no_gradient_reaches_the_taps():
  student = student_lib.Student('resnet18', 'reverse')
  _, abstract = abstract_init(student, 32, 32)
  variables = model_helpers.fill(abstract)
  images, taps = random_inputs()

  @jax.jit
  @jax.grad
  def gradient(taps, variables):
    outputs = student.apply(variables, images, taps)
    return sum(jnp.sum(f) for f in jax.tree.leaves(outputs))

  assert not any(np.any(g) for g in gradient(taps, variables))
