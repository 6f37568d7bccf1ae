"""Synthetic anomalies as batched, stateless TensorFlow ops.

An anomaly is a mask and a filling. Masks are thresholded Perlin noise
(DRAEM's, arXiv 2108.07610) or, for a share of the pairs, one large rotated
ellipse or rectangle, since Perlin blobs cover some 5 % of an image and teach
nothing of a part that is missing. Fillings are textures or the image itself
from elsewhere.

Every draw is keyed by (seed, example, epoch) and a purpose: the same key gives
the same pair at any batch size, parallelism, order or host count.

Synopsis:

  options = synthesis.Options(image_size=256, opacity_max=0.8)
  image, mask = synthesis.synthesize(normal, textures, keys, options)
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

# Grid cells per axis are 2**0 .. 2**(LEVELS - 1).
LEVELS = 6
_GRID = 2 ** (LEVELS - 1) + 1
# Purposes of the draws, folded into the key.
(
  _SCALE,
  _ANGLES,
  _ROTATION,
  _TEXTURE,
  _OPACITY,
  _KIND,
  _SHAPE,
  _SHIFT,
  _TURN,
) = range(9)


@dataclasses.dataclass(frozen=True)
class Options:
  """What to synthesise; the fields of `config.synthesis` plus the size.

  Attributes:
    image_size: side of the square images, in pixels.
    threshold: Perlin noise above it is anomalous; noise is in about [-1, 1].
    rotation_degrees: the noise is rotated by up to this either way.
    opacity_max: b ~ U(0, opacity_max), x_a = (1 - b) A + b x in the mask.
    clean_share: share of the examples left without an anomaly.
    region_share: share of the anomalies that are one large region.
    region_area_min: smallest area of such a region as a share of the image.
    region_area_max: largest area, likewise.
    self_share: share of the anomalies filled from elsewhere in the image.
    min_contrast: a pixel whose every channel would change by less stays as it
      was and outside the mask: an anomaly nobody can see teaches nothing.
    rotate_90: the input is first turned by a random multiple of 90 degrees.
    rotate_degrees: ... and by up to so many degrees either way, reflected at
      the border.
  """

  image_size: int
  threshold: float = 0.5
  rotation_degrees: float = 90.0
  opacity_max: float = 0.8
  clean_share: float = 0.0
  region_share: float = 0.0
  region_area_min: float = 0.02
  region_area_max: float = 0.4
  self_share: float = 0.0
  min_contrast: float = 0.02
  rotate_90: bool = False
  rotate_degrees: float = 0.0

  def __post_init__(self):
    if self.image_size < 32 or self.image_size % 32:
      raise ValueError(
        'config.data.image_size must be a positive multiple of 32, is'
        f' {self.image_size}'
      )
    for name in (
      'opacity_max',
      'clean_share',
      'region_share',
      'self_share',
      'region_area_min',
      'region_area_max',
      'min_contrast',
    ):
      value = getattr(self, name)
      if not 0.0 <= value <= 1.0:
        raise ValueError(
          f'config.synthesis.{name} must be in [0, 1], is {value}'
        )


def make_keys(seed: int, examples: tf.Tensor, epochs: tf.Tensor) -> tf.Tensor:
  """Keys (B, 2) int32 of the draws for (seed, example, epoch), each (B,)."""
  fold = tf.random.experimental.stateless_fold_in

  def one(pair):
    key = tf.constant([seed & 0x7FFFFFFF, 0x5EED], tf.int32)
    return fold(fold(key, pair[0]), pair[1])

  pairs = tf.stack([tf.cast(examples, tf.int32), tf.cast(epochs, tf.int32)], 1)
  return tf.map_fn(one, pairs, fn_output_signature=tf.int32)


def _uniform(keys: tf.Tensor, purpose: int, shape: tuple[int, ...]):
  """U(0, 1) of shape (B, *shape), row i drawn from keys[i] and the purpose."""

  def one(key):
    key = tf.random.experimental.stateless_fold_in(key, purpose)
    return tf.random.stateless_uniform(shape, key, alg='philox')

  return tf.map_fn(one, keys, fn_output_signature=tf.float32)


def _perlin_tables(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Weights (LEVELS, size, _GRID) that make Perlin noise two matmul chains.

  At position p (in cells) the noise sums, over the four corners, the corner's
  gradient times the offset to it, faded by f(1 - |offset|) per axis with
  f(t) = 6 t^5 - 15 t^4 + 10 t^3; f(t) + f(1 - t) = 1, so f serves both sides.
  With R[p, i] = f(max(0, 1 - |p - i|)) and S = R * (p - i) the noise of a whole
  image is S_y G_y R_x^T + R_y G_x S_x^T.
  """
  nodes = np.arange(_GRID)
  fade, slope = [], []
  for level in range(LEVELS):
    position = np.arange(size)[:, None] * (2**level / size)
    t = np.maximum(0.0, 1.0 - np.abs(position - nodes))
    weight = t**3 * (t * (6.0 * t - 15.0) + 10.0)
    fade.append(weight)
    slope.append(weight * (position - nodes))
  return np.float32(fade), np.float32(slope)


def perlin_noise(keys: tf.Tensor, size: int) -> tf.Tensor:
  """Perlin noise (B, size, size), float32, grid 2**U{0..5} cells per axis."""
  fade, slope = _perlin_tables(size)
  level = tf.cast(_uniform(keys, _SCALE, (2,)) * LEVELS, tf.int32)
  angles = _uniform(keys, _ANGLES, (_GRID, _GRID)) * (2.0 * math.pi)
  fade_y, fade_x = (tf.gather(fade, level[:, i]) for i in range(2))
  slope_y, slope_x = (tf.gather(slope, level[:, i]) for i in range(2))
  noise = tf.matmul(
    tf.matmul(slope_y, tf.sin(angles)), fade_x, transpose_b=True
  )
  noise += tf.matmul(
    tf.matmul(fade_y, tf.cos(angles)), slope_x, transpose_b=True
  )
  return math.sqrt(2.0) * noise


def _rotate(
  images: tf.Tensor,
  angles: tf.Tensor,
  fill_mode: str = 'CONSTANT',
  quarters: tf.Tensor | None = None,
) -> tf.Tensor:
  """Rotates (B, S, S, C) about the centre by radians (B,), bilinear.

  Outside the image stand zeros ('CONSTANT') or its mirror image ('REFLECT').
  By so many `quarters` (B,) int32 of a turn more; these keep values exactly.
  """
  center = (images.shape[1] - 1) / 2.0
  cos, sin = tf.cos(angles), tf.sin(angles)
  if quarters is not None:
    # From the table of their cosines: tf.cos(pi / 2) is not 0.
    axis = tf.constant([1.0, 0.0, -1.0, 0.0])
    c, s = tf.gather(axis, quarters), tf.gather(axis, (quarters + 3) % 4)
    cos, sin = cos * c - sin * s, sin * c + cos * s
  zero = tf.zeros_like(cos)
  transforms = tf.stack(
    [
      cos,
      -sin,
      center - cos * center + sin * center,
      sin,
      cos,
      center - sin * center - cos * center,
      zero,
      zero,
    ],
    axis=1,
  )
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=images,
    transforms=transforms,
    output_shape=images.shape[1:3],
    interpolation='BILINEAR',
    fill_mode=fill_mode,
    fill_value=0.0,
  )


def perlin_mask(keys: tf.Tensor, options: Options) -> tf.Tensor:
  """Rotated, thresholded Perlin noise: (B, S, S, 1) bool; some are empty."""
  noise = perlin_noise(keys, options.image_size)[..., None]
  turn = 2.0 * _uniform(keys, _ROTATION, ()) - 1.0
  angles = turn * math.radians(options.rotation_degrees)
  return _rotate(noise, angles) > options.threshold


def region_mask(keys: tf.Tensor, options: Options) -> tf.Tensor:
  """One rotated ellipse or rectangle each: (B, S, S, 1) bool.

  The area is log-uniform in the options' bounds, the aspect ratio log-uniform
  in [1/3, 3], the centre uniform in the image (so a region may be cut off).
  """
  size = options.image_size
  draw = _uniform(keys, _SHAPE, (6,))
  low = math.log(max(options.region_area_min, 1e-4))
  high = math.log(max(options.region_area_max, options.region_area_min, 1e-4))
  area = tf.exp(low + (high - low) * draw[:, 0])
  aspect = tf.exp((2.0 * draw[:, 1] - 1.0) * math.log(3.0))
  is_ellipse = draw[:, 5] < 0.5
  # Half axes in image sides: area = pi a b of an ellipse, 4 a b of a rectangle.
  unit = tf.sqrt(area / tf.where(is_ellipse, math.pi, 4.0))
  half_y, half_x = unit * tf.sqrt(aspect), unit / tf.sqrt(aspect)
  angle = draw[:, 4] * math.pi
  grid = (tf.range(size, dtype=tf.float32) + 0.5) / size
  y = grid[None, :, None] - draw[:, 2][:, None, None]
  x = grid[None, None, :] - draw[:, 3][:, None, None]
  cos, sin = (f(angle)[:, None, None] for f in (tf.cos, tf.sin))
  u = (cos * y + sin * x) / half_y[:, None, None]
  v = (cos * x - sin * y) / half_x[:, None, None]
  inside = tf.where(
    is_ellipse[:, None, None],
    tf.square(u) + tf.square(v) <= 1.0,
    tf.maximum(tf.abs(u), tf.abs(v)) <= 1.0,
  )
  return inside[..., None]


def augment(images: tf.Tensor, keys: tf.Tensor, options: Options) -> tf.Tensor:
  """Turns images (B, S, S, 3) as `rotate_90` and `rotate_degrees` allow."""
  if not options.rotate_90 and not options.rotate_degrees:
    return images
  draw = _uniform(keys, _TURN, (2,))
  angles = (2.0 * draw[:, 0] - 1.0) * math.radians(options.rotate_degrees)
  quarters = tf.cast(4.0 * draw[:, 1], tf.int32) * int(options.rotate_90)
  turned = _rotate(images, angles, 'REFLECT', quarters)
  return tf.clip_by_value(turned, 0.0, 1.0)


def _roll_from_elsewhere(normal: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
  """Each image rolled by a quarter to three quarters of its side."""
  size = normal.shape[1]
  draw = _uniform(keys, _SHIFT, (2,))
  shift = tf.cast((0.25 + 0.5 * draw) * size, tf.int32)
  positions = tf.range(size)[None, :]
  rows = tf.math.floormod(positions + shift[:, 0:1], size)
  columns = tf.math.floormod(positions + shift[:, 1:2], size)
  normal = tf.gather(normal, rows, axis=1, batch_dims=1)
  return tf.gather(normal, columns, axis=2, batch_dims=1)


def synthesize(
  normal: tf.Tensor, textures: tf.Tensor, keys: tf.Tensor, options: Options
) -> tuple[tf.Tensor, tf.Tensor]:
  """Paints one anomaly, or none, on each image.

  Args:
    normal: (B, S, S, 3) float32 in [0, 1].
    textures: (T, S, S, 3) uint8, T >= 1.
    keys: (B, 2) int32 from `make_keys`.
    options: what to synthesise.

  Returns:
    The images (B, S, S, 3) float32 in [0, 1] and their masks (B, S, S, 1)
    float32, 1 exactly where an image differs from `normal`.
  """
  opacity_key, kind = _uniform(keys, _OPACITY, ()), _uniform(keys, _KIND, (3,))
  mask = perlin_mask(keys, options)
  if options.region_share > 0.0:
    use_region = kind[:, 0] < options.region_share
    region = region_mask(keys, options)
    mask = tf.where(use_region[:, None, None, None], region, mask)
  is_clean = kind[:, 1] < options.clean_share
  mask = tf.logical_and(mask, ~is_clean[:, None, None, None])

  count = tf.cast(tf.shape(textures)[0], tf.float32)
  index = tf.cast(_uniform(keys, _TEXTURE, ()) * count, tf.int32)
  filling = tf.cast(tf.gather(textures, index), tf.float32) / 255.0
  if options.self_share > 0.0:
    use_self = kind[:, 2] < options.self_share
    elsewhere = _roll_from_elsewhere(normal, keys)
    filling = tf.where(use_self[:, None, None, None], elsewhere, filling)
  opacity = (options.opacity_max * opacity_key)[:, None, None, None]
  blend = (1.0 - opacity) * filling + opacity * normal
  change = tf.reduce_max(tf.abs(blend - normal), axis=-1, keepdims=True)
  seen = tf.logical_and(change > 0.0, change >= options.min_contrast)
  mask = tf.logical_and(mask, seen)
  return tf.where(mask, blend, normal), tf.cast(mask, tf.float32)
