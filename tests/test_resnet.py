"""The ResNet port against PyTorch's taps and torchvision's parameter counts.

tests/data/teacher_taps.npz comes from tools/make_teacher_fixture.py, which runs
torchvision's network in PyTorch on the same seeded weights and image.
"""

import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdd_jax.models import pretrained
from dmdd_jax.models import resnet

HERE = pathlib.Path(__file__).parent
ARCHS = tuple(resnet.SPECS)
# Published by torchvision for the whole networks, 1000 classes.
TORCHVISION_COUNTS = {
  'resnet18': 11689512,
  'resnet34': 21797672,
  'resnet50': 25557032,
  'wide_resnet50_2': 68883240,
}


@pytest.fixture(scope='module')
def tool():
  """tools/make_teacher_fixture.py as a module; it imports torch only to run."""
  path = HERE.parent / 'tools' / 'make_teacher_fixture.py'
  spec = importlib.util.spec_from_file_location('make_teacher_fixture', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def torch_taps():
  with np.load(HERE / 'data' / 'teacher_taps.npz') as archive:
    return dict(archive)


@pytest.fixture(scope='module')
def jitted_apply():
  """arch -> jitted apply, compiled once for the module."""
  return {arch: jax.jit(resnet.ResNet(arch, stages=3).apply) for arch in ARCHS}


def check_taps(tool, torch_taps, run, apply, variables):
  image = jnp.asarray(tool.make_image().transpose(0, 2, 3, 1))
  for stage, tap in enumerate(apply(variables, image), 1):
    mean, std = torch_taps[f'{run}/layer{stage}/stats']
    got = np.asarray(tap)[0].transpose(2, 0, 1)
    np.testing.assert_allclose(
      tool.sample(got),
      torch_taps[f'{run}/layer{stage}'],
      rtol=1e-4,
      # Values that cancel to almost nothing carry the error of their terms.
      atol=1e-5 * std,
    )
    np.testing.assert_allclose(got.mean(dtype=float), mean, rtol=1e-5)
    np.testing.assert_allclose(got.std(dtype=float), std, rtol=1e-5)


@pytest.mark.parametrize('arch', ARCHS)
def test_taps_equal_torch(arch, tool, torch_taps, jitted_apply):
  weights = {}
  for line in torch_taps[f'{arch}/shapes'].item().decode().splitlines():
    name, *shape = line.split()
    weights[name] = tool.make_weight(name, tuple(map(int, shape)))
  variables = pretrained.from_torch(arch, weights, 'seeded weights')
  check_taps(tool, torch_taps, arch, jitted_apply[arch], variables)


def test_taps_of_the_real_resnet18_equal_torch(tool, torch_taps, jitted_apply):
  root = os.environ.get('DMDD_TEST_DATA')
  if not root:
    pytest.skip('DMDD_TEST_DATA is not set: no real weights')
  path = pathlib.Path(root, 'weights', 'resnet18_layers1-3.safetensors')
  variables, _ = pretrained.load('resnet18', str(path))
  check_taps(
    tool, torch_taps, 'real_resnet18', jitted_apply['resnet18'], variables
  )


def layer4_count(arch):
  """Weights of stage 4, by hand: every conv has a batch norm of 2 a channel."""
  if arch in ('resnet18', 'resnet34'):
    blocks = 2 if arch == 'resnet18' else 3
    first = 9 * 256 * 512 + 9 * 512 * 512 + 256 * 512 + 3 * 2 * 512
    other = 2 * 9 * 512 * 512 + 2 * 2 * 512
    return first + (blocks - 1) * other
  width = 512 if arch == 'resnet50' else 1024
  inner = 9 * width * width + width * 2048 + 2 * (2 * width) + 2 * 2048
  first = 1024 * width + inner + 1024 * 2048 + 2 * 2048
  return first + 2 * (2048 * width + inner)


def fc_count(arch):
  return (512 if arch in ('resnet18', 'resnet34') else 2048) * 1000 + 1000


def init_shapes(arch, stages, channels=3):
  return jax.eval_shape(
    resnet.ResNet(arch, stages=stages).init,
    jax.random.key(0),
    jnp.zeros((1, 32, 32, channels)),
  )


@pytest.mark.parametrize('arch', ARCHS)
def test_parameter_counts_are_torchvisions(arch):
  whole = TORCHVISION_COUNTS[arch] - fc_count(arch)
  for stages, expected in ((4, whole), (3, whole - layer4_count(arch))):
    params = init_shapes(arch, stages)['params']
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize('arch', ARCHS)
def test_tap_sizes_round_up_at_odd_image_sizes(arch):
  model = resnet.ResNet(arch, stages=3)
  taps = jax.eval_shape(
    model.apply, init_shapes(arch, 3), jnp.zeros((2, 37, 70, 3))
  )
  bottleneck = resnet.SPECS[arch].bottleneck
  channels = (256, 512, 1024) if bottleneck else (64, 128, 256)
  assert [t.shape for t in taps] == [
    (2, -(-37 // s), -(-70 // s), c)
    for s, c in zip((4, 8, 16), channels, strict=True)
  ]


def test_training_moves_the_statistics_a_tenth_of_the_way():
  model = resnet.ResNet('resnet18', stages=1)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)

  @jax.jit
  def step(variables, images):
    return model.apply(variables, images, train=True, mutable=['batch_stats'])

  _, moved = step(variables, images)
  before_bn = jax.lax.conv_general_dilated(
    images,
    variables['params']['conv1']['kernel'],
    (2, 2),
    ((3, 3), (3, 3)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  before_bn = np.asarray(before_bn, np.float64).reshape(-1, 64)
  stats = moved['batch_stats']['bn1']
  np.testing.assert_allclose(
    stats['mean'], 0.1 * before_bn.mean(0), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    stats['var'], 0.9 + 0.1 * before_bn.var(0), rtol=1e-4
  )


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_variables():
  model = resnet.ResNet('resnet18', stages=3, dtype=jnp.bfloat16)
  image = jnp.zeros((1, 32, 32, 3))
  taps, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), image
  )
  assert {t.dtype for t in taps} == {jnp.dtype(jnp.bfloat16)}
  dtypes = {x.dtype for x in jax.tree.leaves(variables)}
  assert dtypes == {jnp.dtype(jnp.float32)}


def test_normalize_centres_imagenets_mean_pixel():
  pixels = np.float32([[0.485, 0.456, 0.406], [0.714, 0.68, 0.631]])
  np.testing.assert_allclose(
    resnet.normalize(jnp.asarray(pixels)), [[0, 0, 0], [1, 1, 1]], atol=1e-6
  )


def test_an_unknown_architecture_names_the_known_ones():
  with pytest.raises(ValueError, match="'resnet101'.*wide_resnet50_2"):
    resnet.get_spec('resnet101')


def test_pooling_in_training_is_max_pooling():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 6, 10, 3)), jnp.float32)
  weights = rng.standard_normal((2, 3, 5, 3))

  def pooled(train):
    return jax.value_and_grad(
      lambda x: jnp.sum(weights * resnet.max_pool(x, train))
    )(x)

  np.testing.assert_array_equal(
    resnet.max_pool(x, True), resnet.max_pool(x, False)
  )
  np.testing.assert_allclose(pooled(True)[1], pooled(False)[1], rtol=1e-6)
