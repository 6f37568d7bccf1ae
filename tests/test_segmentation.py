"""The heads: shapes, parameter counts by formula, attention by numpy."""

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import pytest

from dmdd_jax.models import segmentation

HEADS = {
  'multi_perception': segmentation.MultiPerceptionHead,
  'destseg': segmentation.DestsegHead,
}


def abstract_init(head, shape=(2, 8, 8, 6), train=False):
  """Shapes of output and variables; nothing is computed."""
  inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(
    lambda x: head.init_with_output(jax.random.key(0), x, train=train), inputs
  )


def parameters(head):
  return abstract_init(head)[1]['params']


# --- parameter counts, by hand -----------------------------------------------


def conv_bn(kernel, inputs, outputs):
  return kernel**2 * inputs * outputs + 2 * outputs


def perceptions_count(inputs, width, dilations):
  """A 1x1 for dilation 1, 3x3 for others, a dense layer on the mean."""
  branches = sum(conv_bn(1 if d == 1 else 3, inputs, width) for d in dilations)
  return branches + inputs * width + width


def channel_attention_count(channels):
  hidden = channels // 4
  return channels * hidden + hidden + hidden * channels + channels


SPATIAL_ATTENTION_COUNT = 7 * 7 * 2 + 1


@pytest.mark.parametrize('dilations', [(1, 6, 12, 18), (1, 2), (3,)])
@pytest.mark.parametrize('width', [8, 32])
def test_parameter_counts(width, dilations):
  views = width * (len(dilations) + 1)
  perceptions = perceptions_count(width, width, dilations)
  logit = width + 1
  expected = {
    'multi_perception': conv_bn(3, 6, width)
    + perceptions
    + channel_attention_count(views)
    + SPATIAL_ATTENTION_COUNT
    + conv_bn(3, views, width)
    + logit,
    # Two residual blocks, the first with a 1x1 shortcut from 6 channels.
    'destseg': conv_bn(3, 6, width)
    + conv_bn(1, 6, width)
    + 3 * conv_bn(3, width, width)
    + perceptions
    + conv_bn(1, views, width)
    + conv_bn(3, width, width)
    + logit,
  }
  for kind, head in HEADS.items():
    found = parameters(head(width=width, dilations=dilations))
    assert model_helpers.count(found) == expected[kind], kind


@pytest.mark.parametrize('spatial', [True, False])
@pytest.mark.parametrize('channel', [True, False])
def test_switches_remove_exactly_their_attention(channel, spatial):
  full = parameters(segmentation.MultiPerceptionHead(width=8))
  found = parameters(
    segmentation.MultiPerceptionHead(
      width=8, channel_attention=channel, spatial_attention=spatial
    )
  )
  removed = set()
  removed |= set() if channel else {'channel_attention'}
  removed |= set() if spatial else {'spatial_attention'}
  assert set(full) - set(found) == removed and set(found) <= set(full)
  assert found == {name: full[name] for name in found}


@pytest.mark.parametrize('shape', [(1, 8, 8, 6), (3, 5, 11, 2), (2, 1, 1, 6)])
@pytest.mark.parametrize('kind', HEADS)
def test_logits_have_the_size_of_the_maps(kind, shape):
  # Dilations beyond the map's own size too.
  for train in (False, True):
    output, _ = abstract_init(HEADS[kind](width=4), shape, train)
    assert output.shape == (*shape[:3], 1) and output.dtype == jnp.float32


@pytest.mark.parametrize('kind', HEADS)
def test_bfloat16_heads_keep_float32_parameters_and_logits(kind):
  output, variables = abstract_init(HEADS[kind](width=4, dtype=jnp.bfloat16))
  assert output.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype('float32')
  }


# --- attentions and perceptions against numpy --------------------------------


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


@pytest.fixture(scope='module')
def features():
  return np.random.default_rng(0).normal(size=(2, 4, 3, 8)).astype(np.float32)


def filled(module, features):
  abstract = jax.eval_shape(
    lambda x: module.init(jax.random.key(0), x), features
  )
  return model_helpers.fill(abstract)


def test_channel_attention_equals_numpy(features):
  module = segmentation.ChannelAttention()
  variables = filled(module, features)
  squeeze, excite = (
    variables['params'][name] for name in ('squeeze', 'excite')
  )

  def two_layers(pooled):
    hidden = np.maximum(pooled @ squeeze['kernel'] + squeeze['bias'], 0.0)
    return hidden @ excite['kernel'] + excite['bias']

  gate = sigmoid(
    two_layers(features.mean(axis=(1, 2)))
    + two_layers(features.max(axis=(1, 2)))
  )
  found = module.apply(variables, features)
  np.testing.assert_allclose(
    found, features * gate[:, None, None], rtol=1e-4, atol=1e-5
  )


def test_spatial_attention_equals_numpy(features):
  module = segmentation.SpatialAttention()
  variables = filled(module, features)
  conv = variables['params']['conv']
  pooled = np.stack([features.mean(axis=-1), features.max(axis=-1)], axis=-1)
  padded = np.pad(pooled, ((0, 0), (3, 3), (3, 3), (0, 0)))
  gate = np.zeros(features.shape[:3])
  for y, x in np.ndindex(*gate.shape[1:]):
    window = padded[:, y : y + 7, x : x + 7]
    gate[:, y, x] = np.sum(window * conv['kernel'][..., 0], axis=(1, 2, 3))
  gate = sigmoid(gate + conv['bias'])
  found = module.apply(variables, features)
  np.testing.assert_allclose(
    found, features * gate[..., None], rtol=1e-4, atol=1e-5
  )


def test_perceptions_see_as_far_as_their_dilation():
  """A changed pixel moves what it should: by itself, at d, and everywhere."""
  module = segmentation.Perceptions(4, (1, 2))
  image = np.random.default_rng(1).normal(size=(1, 7, 7, 3)).astype('f')
  changed = image.copy()
  changed[0, 3, 3] += 1.0
  variables = filled(module, image)
  # A bias that keeps the ReLUs open, so that every change is seen.
  params = dict(variables['params'])
  for name in ('dilated1', 'dilated2'):
    bn = {**params[name]['bn'], 'bias': np.full(4, 50.0, np.float32)}
    params[name] = {**params[name], 'bn': bn}
  params['global'] = {**params['global'], 'bias': np.full(4, 50.0, np.float32)}
  apply = jax.jit(module.apply)
  variables = {**variables, 'params': params}
  difference = np.asarray(apply(variables, changed) - apply(variables, image))
  moved = np.any(difference.reshape(7, 7, 3, 4) != 0, axis=-1)
  own, dilated = np.zeros((7, 7), bool), np.zeros((7, 7), bool)
  own[3, 3] = dilated[1:6:2, 1:6:2] = True
  np.testing.assert_array_equal(moved[..., 0], own)
  np.testing.assert_array_equal(moved[..., 1], dilated)
  assert np.all(moved[..., 2])
