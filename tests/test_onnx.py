"""The ONNX writer: each primitive gives jax's numbers or is refused."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdd_jax.export import onnx as onnx_writer
from dmdd_jax.export import onnx_primitives

pytest.importorskip('onnx', reason='the extra onnx is not installed')

SHAPE = (8, 8, 4)
KERNEL = np.random.default_rng(1).normal(size=(3, 3, 4, 4)).astype(np.float32)
NHWC = ('NHWC', 'HWIO', 'NHWC')


def floats(x):
  return x.astype('float32')


def convolve(x, padding='SAME', kernel=KERNEL, strides=(1, 1), **changes):
  return lax.conv_general_dilated(
    floats(x) / 255,
    kernel,
    strides,
    padding,
    dimension_numbers=NHWC,
    **changes,
  )


def pool(
  x,
  window=(1, 3, 3, 1),
  strides=(1, 1, 1, 1),
  padding='VALID',
  base=(1, 1, 1, 1),
  dilation=(1, 1, 1, 1),
):
  low = -np.inf if x.dtype == np.float32 else np.array(0, x.dtype)
  return lax.reduce_window(
    x, low, lax.max, window, strides, padding, base, dilation
  )


def gather(x, index, mode='clip', size=1):
  """x[..., index], in the mode that `lax` is given."""
  numbers = lax.GatherDimensionNumbers(
    offset_dims=(0, 1, 2), collapsed_slice_dims=(3,), start_index_map=(3,)
  )
  return lax.gather(
    floats(x),
    jnp.array([index]),
    numbers,
    (x.shape[0], *SHAPE[:2], size),
    mode=mode,
  )


def dot(x, y, **changes):
  numbers = (((3,), (0,)), ((), ()))
  return lax.dot_general(x, y, numbers, **changes)


def sum_over(axes):
  return lambda x: lax.reduce_sum_p.bind(x, axes=axes, out_sharding=None)


def scan(x):
  return lax.scan(lambda carry, _: (carry * 2, None), x, length=3)[0]


def write(path, function):
  onnx_writer.write(str(path), lambda x: {'y': function(x)}, SHAPE, {})


# By primitive; a dash separates what distinguishes several of one primitive.
TRANSLATED = {
  'abs': lambda x: abs(floats(x) - 128),
  'add': lambda x: floats(x) + np.arange(4, dtype=np.float32),
  'broadcast_in_dim-constant': lambda x: (
    floats(x) + jnp.broadcast_to(np.float32([1, 2, 3, 4]), SHAPE)
  ),
  'broadcast_in_dim-expand': lambda x: jnp.broadcast_to(
    x[:, None], (x.shape[0], 3, *SHAPE)
  ),
  'broadcast_in_dim-floats': lambda x: jnp.broadcast_to(
    floats(x).max((1, 2), keepdims=True), x.shape
  ),
  'concatenate': lambda x: jnp.concatenate([floats(x), floats(x) * 2], -1),
  'concatenate-batch': lambda x: jnp.concatenate([x, x], 0),
  'conv_general_dilated': convolve,
  'conv_general_dilated-dilation': lambda x: convolve(x, rhs_dilation=(2, 2)),
  'conv_general_dilated-groups': lambda x: convolve(
    x, kernel=KERNEL[:, :, :2], feature_group_count=2
  ),
  'conv_general_dilated-padding': lambda x: convolve(x, ((2, 0), (1, 5))),
  'conv_general_dilated-strides': lambda x: convolve(x, strides=(2, 3)),
  'convert_element_type': floats,
  'div': lambda x: floats(x) / (floats(x) + 1),
  'dot_general': lambda x: dot(floats(x), KERNEL[0, 0]),
  'dot_general-batch': lambda x: jnp.einsum(
    'nhwc,nhwd->nhcd', floats(x), floats(x) * 2
  ),
  'exp': lambda x: jnp.exp(floats(x) / 99),
  'expand_dims': lambda x: jnp.expand_dims(floats(x), (1, 3)),
  'gather-first': lambda x: gather(x, 0),
  'gather-last': lambda x: gather(x, 3, 'fill'),
  'gather-promised': lambda x: floats(x)[..., -1],
  'integer_pow': lambda x: lax.integer_pow(floats(x) - 128, 3),
  'integer_pow-negative': lambda x: lax.integer_pow(floats(x) + 1, -2),
  'integer_pow-zero': lambda x: lax.integer_pow_p.bind(floats(x), y=0),
  'iota': lambda x: floats(x) + lax.iota('float32', 4),
  'logistic': lambda x: jax.nn.sigmoid((floats(x) - 128) / 16),
  'max': lambda x: jnp.maximum(floats(x), 99),
  'min': lambda x: jnp.minimum(floats(x), 99),
  'mul': lambda x: floats(x) * floats(x),
  'neg': lambda x: -floats(x),
  'reduce_max': lambda x: floats(x).max((1, 2)),
  'reduce_max-none': lambda x: lax.reduce_max_p.bind(
    floats(x), axes=(), out_sharding=None
  ),
  'reduce_sum': lambda x: floats(x).sum((1, 3)),
  'reduce_sum-batch': lambda x: floats(x) - floats(x).sum(0, keepdims=True),
  'reduce_sum-none': lambda x: sum_over(())(floats(x)),
  'reduce_window_max': lambda x: pool(floats(x)),
  'reduce_window_max-padding': lambda x: pool(
    -floats(x),
    strides=(1, 2, 1, 1),
    padding=((0, 0), (1, 2), (0, 1), (0, 0)),
  ),
  'reshape': lambda x: x.reshape(x.shape[0], -1),
  'reshape-batch': lambda x: floats(x).reshape(-1, 4),
  'rev': lambda x: lax.rev(x, (1, 2)),
  'rev-batch': lambda x: lax.rev(floats(x), (0,)),
  'rsqrt': lambda x: lax.rsqrt(floats(x) + 1),
  'slice': lambda x: lax.slice(
    x, (0, 1, 0, 1), (x.shape[0], 7, 8, 4), (1, 2, 1, 1)
  ),
  'sqrt': lambda x: jnp.sqrt(floats(x)),
  'square': lambda x: lax.square(floats(x)),
  'squeeze': lambda x: lax.squeeze(
    lax.slice_in_dim(floats(x), 1, 2, axis=1), (1,)
  ),
  'stack': lambda x: jnp.stack([floats(x), floats(x) * 2], 1),
  'stop_gradient': lambda x: lax.stop_gradient(floats(x) * 2),
  'sub': lambda x: floats(x) - 3,
  'top_k': lambda x: lax.top_k(floats(x), 2)[0],
  'top_k-axis': lambda x: lax.top_k(floats(x), 2, axis=1)[0],
  'transpose': lambda x: x.transpose(0, 3, 1, 2),
}


@pytest.mark.parametrize('name', TRANSLATED)
def test_a_translated_primitive_gives_what_jax_gives(name, tmp_path):
  onnxruntime = pytest.importorskip('onnxruntime')
  function = TRANSLATED[name]
  write(tmp_path / 'model.onnx', function)
  session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
  rng = np.random.default_rng(0)
  for count in (1, 3):
    images = rng.integers(0, 256, (count, *SHAPE), np.uint8)
    expected = np.asarray(function(jnp.asarray(images)))
    (output,) = session.run(['y'], {'images': images})
    assert output.dtype == expected.dtype
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_each_translation_is_compared_with_jax():
  translations = {
    *onnx_primitives._ELEMENTWISE,
    *onnx_primitives._TRANSLATIONS,
  }
  assert translations <= {name.split('-')[0] for name in TRANSLATED}


# The function, and a pattern of the message: the primitive, then the reason.
REFUSED = {
  'sin': (lambda x: jnp.sin(floats(x)), 'sin has no'),
  'sort': (lambda x: lax.sort(floats(x)), 'sort has no'),
  'scan': (lambda x: scan(floats(x)), 'scan has no'),
  'remat': (lambda x: jax.checkpoint(lambda y: y * 2)(floats(x)), 'remat'),
  'top_k-indices': (lambda x: lax.top_k(floats(x), 2)[1], "top_k's indices"),
  'top_k-uint8': (lambda x: lax.top_k(x, 2)[0], 'top_k with uint8'),
  'convolution-cut': (
    lambda x: convolve(x, ((-1, 1), (0, 0))),
    'conv_general_dilated with padding',
  ),
  'convolution-dilated-input': (
    lambda x: convolve(x, ((1, 1), (1, 1)), lhs_dilation=(2, 2)),
    'conv_general_dilated with lhs_dilation',
  ),
  'convolution-grouped-batch': (
    lambda x: lax.conv_general_dilated(
      floats(x).sum(0)[None].transpose(3, 1, 2, 0),
      KERNEL[:, :, :1],
      (1, 1),
      'SAME',
      dimension_numbers=NHWC,
      batch_group_count=2,
    ),
    'conv_general_dilated with .*batch_group_count=2',
  ),
  'convolution-computed-kernel': (
    lambda x: convolve(x, kernel=floats(x).sum((0, 1, 2)) * KERNEL),
    'conv_general_dilated with a kernel that depends on the images',
  ),
  'reshape-transposed': (
    lambda x: lax.reshape(floats(x), (x.shape[0], 256), (0, 2, 1, 3)),
    'reshape with dimensions',
  ),
  'pool-channels': (
    lambda x: pool(floats(x), (1, 3, 3, 3)),
    'reduce_window_max with window_dimensions',
  ),
  'pool-channel-strides': (
    lambda x: pool(floats(x), strides=(1, 1, 1, 2)),
    'reduce_window_max with window_strides',
  ),
  'pool-channel-padding': (
    lambda x: pool(floats(x), padding=((0, 0), (1, 1), (1, 1), (1, 1))),
    'reduce_window_max with .*padding',
  ),
  'pool-dilated-input': (
    lambda x: pool(floats(x), base=(1, 2, 1, 1)),
    'reduce_window_max with .*base_dilation',
  ),
  'pool-dilated': (
    lambda x: pool(floats(x), dilation=(1, 2, 2, 1)),
    'reduce_window_max with .*window_dilation',
  ),
  'pool-cut': (
    lambda x: pool(floats(x), padding=((0, 0), (-1, 1), (0, 0), (0, 0))),
    'reduce_window_max with padding',
  ),
  'pool-wide-padding': (
    lambda x: pool(floats(x), padding=((0, 0), (0, 3), (0, 0), (0, 0))),
    'reduce_window_max with .*padding',
  ),
  'pool-uint8': (pool, 'reduce_window_max with uint8'),
  'pool-int32': (lambda x: pool(x.astype('int32')), '-> int32'),
  'gather-negative-clip': (lambda x: gather(x, -1), 'gather .*-1.*CLIP'),
  'gather-negative-fill': (
    lambda x: gather(x, -1, 'fill'),
    'gather .*-1.*FILL',
  ),
  'gather-high-clip': (lambda x: gather(x, 4), 'gather .*4.*CLIP'),
  'gather-high-fill': (lambda x: gather(x, 4, 'fill'), 'gather .*4.*FILL'),
  'gather-several': (
    lambda x: floats(x)[..., jnp.array([0, 2])],
    'gather with dimension_numbers',
  ),
  'gather-list-of-one': (
    lambda x: floats(x)[..., jnp.array([2])],
    'gather with dimension_numbers',
  ),
  'integer_pow-int32': (
    lambda x: lax.integer_pow(x.astype('int32'), 7),
    'convert_element_type with uint8.* -> int32',
  ),
  'integer_pow-uint8': (
    lambda x: lax.integer_pow(x, 3),
    'integer_pow with uint8',
  ),
  'cast-to-uint8': (
    lambda x: floats(x).astype('uint8'),
    'convert_element_type with new_dtype=uint8',
  ),
  'reduce_sum-uint8': (sum_over((3,)), 'reduce_sum with uint8'),
  'neg-uint8': (lambda x: -x, 'neg with uint8'),
  'add-uint8': (lambda x: x + x, 'add with uint8'),
  'dot-uint8': (
    lambda x: dot(x, np.ones((4, 4), np.uint8)),
    'dot_general with uint8',
  ),
  'dot-preferred-type': (
    lambda x: dot(floats(x), KERNEL[0, 0], preferred_element_type=jnp.bfloat16),
    'dot_general with .* -> bfloat16',
  ),
  'slice-batch': (
    lambda x: lax.slice(floats(x), (0, 0, 0, 0), (1, *SHAPE)),
    'slice with start_indices',
  ),
  'no-elements': (
    lambda x: lax.slice_in_dim(floats(x), 3, 3, axis=1),
    'slice with float32',
  ),
  'two-batches': (
    lambda x: dot(floats(x), floats(x).sum((1, 2)).T).reshape(
      x.shape[0], 64, x.shape[0]
    ),
    'reshape with float32',
  ),
  'batch-constant': (
    lambda x: jnp.ones(x.shape, 'float32'),
    'broadcast_in_dim with shape=.batch',
  ),
  'batch-constant-summed': (
    lambda x: floats(x) * jnp.ones(x.shape, 'float32').sum(0),
    'broadcast_in_dim with shape=.batch',
  ),
  'batch-constant-joined': (
    lambda x: jnp.concatenate([floats(x), jnp.ones(x.shape, 'float32')], -1),
    'broadcast_in_dim with shape=.batch',
  ),
  'batch-broadcast': (
    lambda x: jnp.broadcast_to(floats(x).sum(0, keepdims=True), x.shape),
    'broadcast_in_dim with shape=.batch',
  ),
  'batch-iota': (
    lambda x: floats(x) + lax.broadcasted_iota('float32', x.shape, 0),
    'iota with shape=.batch',
  ),
  'batch-mean': (lambda x: floats(x).mean(0), 'dim_as_value with dim=batch'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_onnx_cannot_compute_is_refused(name, tmp_path):
  function, message = REFUSED[name]
  path = tmp_path / 'model.onnx'
  with pytest.raises(onnx_writer.UnknownPrimitiveError, match=message):
    write(path, function)
  assert not path.exists()
