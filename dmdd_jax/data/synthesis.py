"""Synthetic anomalies as batched, stateless TensorFlow ops.

An anomaly is a mask and a filling. Masks are thresholded Perlin noise
(DRAEM's, arXiv 2108.07610) or, for a share of the pairs, one large rotated
ellipse or rectangle, since Perlin blobs cover about 5 % of an image and teach
nothing of a part that is missing. Fillings are textures or the image itself
from elsewhere.

Every draw is keyed by (seed, example, epoch): the same key gives the same pair
at any batch size, parallelism, order or host count.

Synopsis:

  options = pipeline.options(config)
  draws = synthesis.draw(seed, examples, epochs)
  image, mask = synthesis.synthesize(normal, textures, draws, options)
"""

from collections.abc import Mapping
import dataclasses
import math

import numpy as np
import tensorflow as tf

from dmdd_jax.data import rotation
from dmdd_jax.data import texture_augment

Draws = Mapping[str, tf.Tensor]

# Grid cells per axis are 2**0 .. 2**(LEVELS - 1).
LEVELS = 6
_GRID = 2 ** (LEVELS - 1) + 1
# How many uniform numbers each purpose takes from an example's stream, in
# order. Any change here, appending too, changes every pair: the second half of
# the numbers are the second words of the counters of the first half.
_DRAWS = {
  'turn': 2,
  'scale': 2,
  'rotation': 1,
  'texture': 1,
  'opacity': 1,
  'kind': 3,
  'shape': 6,
  'shift': 2,
  'angles': _GRID * _GRID,
}
# Purposes that came later, from the counters after those: what comes last here
# can be appended to, and changes nothing of what the others get.
_LATER_DRAWS = {
  'augment_order': texture_augment.COUNT,
  'augment_values': texture_augment.VALUES,
  'lighting': 1,
}
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Of Threefry-2x32.


@dataclasses.dataclass(frozen=True)
class Options:
  """What to synthesise; the fields of `config.synthesis` plus the size.

  The defaults stand in configs/default.py alone.

  Attributes:
    image_size: side of the square images, in pixels.
    threshold: Perlin noise above it is anomalous; noise is in about [-1, 1].
    rotation_degrees: the noise is rotated by up to this either way.
    opacity_max: b ~ U(0, opacity_max), x_a = (1 - b) A + b x in the mask.
    clean_share: share of the examples that get no anomaly.
    region_share: share of the anomalies that are one large region.
    region_area_min: smallest area of such a region as a share of the image.
    region_area_max: largest area, likewise.
    self_share: share of the anomalies filled from elsewhere in the image.
    min_contrast: a pixel whose every channel would change by less stays as it
      was and outside the mask: an anomaly nobody can see teaches nothing.
    rotate_90: the input is first rotated by a random multiple of 90 degrees.
    rotate_degrees: the input is then rotated by up to this many degrees either
      way, and mirrored at the border.
    lighting: the input's brightness is then multiplied by a factor in
      [1 - this, 1 + this] and cut off at white.
    foreground: where anomalies may be: anywhere ('off'), or on the object as
      the module `foreground` segments it ('otsu', 'grabcut'); the caller passes
      the masks.
    texture_augment: textures are altered as DRAEM does, see `texture_augment`.
  """

  image_size: int
  threshold: float
  rotation_degrees: float
  opacity_max: float
  clean_share: float
  region_share: float
  region_area_min: float
  region_area_max: float
  self_share: float
  min_contrast: float
  rotate_90: bool
  rotate_degrees: float
  lighting: float
  foreground: str
  texture_augment: bool


def threefry(
  key: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
  """Threefry-2x32 with 20 rounds on uint32 tensors that broadcast.

  A counter-based generator: each output is a function of (key, counter) alone.
  Written in elementwise ops since tf.random's stateless ops take one key a
  call, and a batch here has a key for every example.

  Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
  """
  keys = (*key, key[0] ^ key[1] ^ tf.constant(0x1BD11BDA, tf.uint32))
  x, y = counter[0] + keys[0], counter[1] + keys[1]
  for group in range(5):
    for bits in _ROTATIONS[group % 2]:
      x = x + y
      left = tf.bitwise.left_shift(y, tf.constant(bits, tf.uint32))
      right = tf.bitwise.right_shift(y, tf.constant(32 - bits, tf.uint32))
      y = (left | right) ^ x
    x = x + keys[(group + 1) % 3]
    y = y + keys[(group + 2) % 3] + tf.constant(group + 1, tf.uint32)
  return x, y


def draw(
  seed: int, examples: tf.Tensor, epochs: tf.Tensor
) -> dict[str, tf.Tensor]:
  """The random numbers of a batch, each example keyed by its own identity.

  Args:
    seed: of the run; its lowest 32 bits count.
    examples: (B,) int64, >= 0, index of the image.
    epochs: (B,) int64, >= 0.

  Returns:
    {purpose: (B, n) float32 in [0, 1)} for the purposes of a pair.
  """
  key = (
    tf.constant(seed & 0xFFFFFFFF, tf.uint32),
    tf.cast(examples, tf.uint32)[:, None],
  )
  first = (sum(_DRAWS.values()) + 1) // 2
  return {
    **_stream(key, epochs, 0, _DRAWS),
    **_stream(key, epochs, first, _LATER_DRAWS),
  }


def _stream(
  key: tuple[tf.Tensor, tf.Tensor],
  epochs: tf.Tensor,
  first: int,
  purposes: Mapping[str, int],
) -> dict[str, tf.Tensor]:
  """{purpose: (B, n)} from the counters from `first` on, two numbers each."""
  total = sum(purposes.values())
  index = tf.range(first, first + (total + 1) // 2, dtype=tf.int64)
  counter = (
    tf.cast(epochs, tf.uint32)[:, None],
    tf.cast(index, tf.uint32)[None, :],
  )
  bits = tf.concat(threefry(key, counter), axis=1)
  bits = tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32))
  numbers = tf.cast(bits, tf.float32) * 2.0**-24
  parts = tf.split(numbers[:, :total], list(purposes.values()), axis=1)
  return dict(zip(purposes, parts))


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
  return np.array(fade, np.float32), np.array(slope, np.float32)


def perlin_noise(draws: Draws, size: int) -> tf.Tensor:
  """Perlin noise (B, size, size), float32, grid 2**U{0..5} cells per axis."""
  fade, slope = _perlin_tables(size)
  level = tf.cast(draws['scale'] * LEVELS, tf.int32)
  angles = tf.reshape(draws['angles'], [-1, _GRID, _GRID]) * (2.0 * math.pi)
  fade_y, fade_x = (tf.gather(fade, level[:, i]) for i in range(2))
  slope_y, slope_x = (tf.gather(slope, level[:, i]) for i in range(2))
  # The sum of two products as one product of stacked factors.
  left = tf.concat(
    [tf.matmul(slope_y, tf.sin(angles)), tf.matmul(fade_y, tf.cos(angles))],
    axis=2,
  )
  right = tf.concat([fade_x, slope_x], axis=2)
  return math.sqrt(2.0) * tf.matmul(left, right, transpose_b=True)


def perlin_mask(draws: Draws, options: Options) -> tf.Tensor:
  """Rotated, thresholded Perlin noise: (B, S, S, 1) bool; some are empty.

  The noise is read bilinearly at rotated positions, 0 outside the image. By
  gathers, which XLA fuses with all around them; TF's own op takes twice as
  long.
  """
  size = options.image_size
  # One row and column of zeros before, two after, for what lies outside.
  noise = perlin_noise(draws, size)
  noise = tf.pad(noise, [[0, 0], [1, 2], [1, 2]])
  padded = size + 3
  rotation_share = 2.0 * draws['rotation'] - 1.0  # In [-1, 1).
  angles = rotation_share[..., None] * math.radians(options.rotation_degrees)
  cos, sin = tf.cos(angles), tf.sin(angles)
  center = (size - 1) / 2.0
  offset = tf.range(size, dtype=tf.float32) - center
  y, x = offset[None, :, None], offset[None, None, :]
  y, x = sin * x + cos * y, cos * x - sin * y
  y, x = (tf.clip_by_value(v + (center + 1.0), 0.0, size + 1.0) for v in (y, x))
  row, column = tf.cast(y, tf.int32), tf.cast(x, tf.int32)
  first = tf.range(tf.shape(noise)[0])[:, None, None] * padded**2
  corner = first + row * padded + column
  flat = tf.reshape(noise, [-1])
  top, top_right, bottom, bottom_right = (
    tf.gather(flat, corner + step) for step in (0, 1, padded, padded + 1)
  )
  y, x = y - tf.cast(row, tf.float32), x - tf.cast(column, tf.float32)
  top += x * (top_right - top)
  bottom += x * (bottom_right - bottom)
  return (top + y * (bottom - top) > options.threshold)[..., None]


def region_mask(draws: Draws, options: Options) -> tf.Tensor:
  """One rotated ellipse or rectangle each: (B, S, S, 1) bool.

  The area is log-uniform in the options' bounds, the aspect ratio log-uniform
  in [1/3, 3], the centre uniform in the image (so a region may be cut off).
  """
  size = options.image_size
  shape = draws['shape']
  low = math.log(max(options.region_area_min, 1e-4))
  high = math.log(max(options.region_area_max, options.region_area_min, 1e-4))
  area = tf.exp(low + (high - low) * shape[:, 0])
  aspect = tf.exp((2.0 * shape[:, 1] - 1.0) * math.log(3.0))
  is_ellipse = shape[:, 5] < 0.5
  # Half axes in image sides: area = pi a b of an ellipse, 4 a b of a rectangle.
  unit = tf.sqrt(area / tf.where(is_ellipse, math.pi, 4.0))
  half_y, half_x = unit * tf.sqrt(aspect), unit / tf.sqrt(aspect)
  angle = shape[:, 4] * math.pi
  grid = (tf.range(size, dtype=tf.float32) + 0.5) / size
  y = grid[None, :, None] - shape[:, 2][:, None, None]
  x = grid[None, None, :] - shape[:, 3][:, None, None]
  cos, sin = (f(angle)[:, None, None] for f in (tf.cos, tf.sin))
  u = (cos * y + sin * x) / half_y[:, None, None]
  v = (cos * x - sin * y) / half_x[:, None, None]
  inside = tf.where(
    is_ellipse[:, None, None],
    tf.square(u) + tf.square(v) <= 1.0,
    tf.maximum(tf.abs(u), tf.abs(v)) <= 1.0,
  )
  return inside[..., None]


def augment(images: tf.Tensor, draws: Draws, options: Options) -> tf.Tensor:
  """Turns images (B, S, S, C) as `rotate_90` and `rotate_degrees` allow."""
  if not options.rotate_90 and not options.rotate_degrees:
    return images
  share = 2.0 * draws['turn'][:, 0] - 1.0  # In [-1, 1).
  angles = share * math.radians(options.rotate_degrees)
  rotated = _rotate(images, angles, quarters(draws, options))
  return tf.clip_by_value(rotated, 0.0, 1.0)


def light(images: tf.Tensor, draws: Draws, options: Options) -> tf.Tensor:
  """Makes images (B, S, S, 3) in [0, 1] brighter or darker, by `lighting`."""
  if not options.lighting:
    return images
  share = 2.0 * draws['lighting'][:, :, None, None] - 1.0  # In [-1, 1).
  return tf.minimum((1.0 + options.lighting * share) * images, 1.0)


def quarters(draws: Draws, options: Options) -> tf.Tensor:
  """By how many quarters of a turn `augment` turns each image, (B,) int32."""
  return tf.cast(4.0 * draws['turn'][:, 1], tf.int32) * int(options.rotate_90)


def _rotate(
  images: tf.Tensor, angles: tf.Tensor, turns: tf.Tensor
) -> tf.Tensor:
  """Rotates (B, S, S, C) about the centre by radians (B,), bilinear, mirrored.

  By `turns` (B,) int32 quarters of a turn more; these keep values exactly.
  """
  cos, sin = tf.cos(angles), tf.sin(angles)
  # From the table of their cosines: tf.cos(pi / 2) is not 0.
  axis = tf.constant([1.0, 0.0, -1.0, 0.0])
  c, s = tf.gather(axis, turns), tf.gather(axis, (turns + 3) % 4)
  cos, sin = cos * c - sin * s, sin * c + cos * s
  return rotation.rotate(images, cos, sin, 'REFLECT')


def _fill_from_elsewhere(
  filling: tf.Tensor, normal: tf.Tensor, draws: Draws, share: float
) -> tf.Tensor:
  """Replaces a share of the fillings by the image itself, moved.

  It is rolled by 1/64 to 1/2 of its side either way, log-uniform: far shifts
  bring other parts of the object, near ones displace its structure.
  """
  rows = tf.where(draws['kind'][:, 2] < share)
  image, shift = (tf.gather_nd(x, rows) for x in (normal, draws['shift']))
  image = tf.cast(tf.round(255.0 * image), tf.uint8)
  direction = 2.0 * shift - 1.0  # Its sign; its size draws the distance.
  distance = tf.pow(2.0, 5.0 * tf.abs(direction) - 6.0) * normal.shape[1]
  shift = tf.cast(tf.sign(direction) * tf.math.ceil(distance), tf.int32)
  # One by one: it copies whole stretches, a batched gather copies pixels.
  moved = tf.map_fn(
    lambda pair: tf.roll(pair[0], -pair[1], (0, 1)),
    (image, shift),
    fn_output_signature=tf.TensorSpec(normal.shape[1:], tf.uint8),
  )
  return tf.tensor_scatter_nd_update(filling, rows, moved)


def synthesize(
  normal: tf.Tensor,
  textures: tf.Tensor,
  draws: Draws,
  options: Options,
  foreground: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Paints one anomaly, or none, on each image.

  Args:
    normal: (B, S, S, 3) float32 in [0, 1].
    textures: (T, S, S, 3) uint8, T >= 1.
    draws: of the B examples, from `draw`.
    options: what to synthesise.
    foreground: (B, S, S, 1) float32, turned like the images: above 0.5 an
      anomaly may be.

  Returns:
    The images (B, S, S, 3) float32 in [0, 1] and their masks (B, S, S, 1)
    float32, 1 exactly where an image differs from `normal`.
  """
  count = tf.cast(tf.shape(textures)[0], tf.float32)
  index = tf.cast(draws['texture'][:, 0] * count, tf.int32)
  texture = tf.gather(textures, index)
  if options.texture_augment:
    texture = texture_augment.augment(
      tf.cast(texture, tf.float32) / 255.0,
      draws['augment_order'],
      draws['augment_values'],
    )
    texture = tf.cast(tf.round(255.0 * texture), tf.uint8)
  if options.self_share > 0.0:
    texture = _fill_from_elsewhere(texture, normal, draws, options.self_share)
  used = ('scale', 'angles', 'rotation', 'kind', 'shape')
  mask = _draw_masks({name: draws[name] for name in used}, options)
  if foreground is not None:
    mask = tf.logical_and(mask, foreground > 0.5)
  return _paint(normal, texture, mask, draws['opacity'], options)


@tf.function(jit_compile=True, autograph=False)
def _draw_masks(draws: Draws, options: Options) -> tf.Tensor:
  """Where the anomalies are, (B, S, S, 1) bool: blobs, regions or nowhere.

  Compiled apart from `_paint`, into which XLA would else fuse it, and draw the
  masks anew for each channel of the image.
  """
  kind = draws['kind'][..., None, None, None]
  mask = perlin_mask(draws, options)
  if options.region_share > 0.0:
    region = region_mask(draws, options)
    mask = tf.where(kind[:, 0] < options.region_share, region, mask)
  return tf.logical_and(mask, kind[:, 1] >= options.clean_share)


@tf.function(jit_compile=True, autograph=False)
def _paint(
  normal: tf.Tensor,
  filling: tf.Tensor,
  mask: tf.Tensor,
  opacity: tf.Tensor,
  options: Options,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Paints uint8 fillings where masks say, and where they can be seen."""
  filling = tf.cast(filling, tf.float32) / 255.0
  opacity = options.opacity_max * opacity[:, :, None, None]
  # This form cannot leave [0, 1] by rounding.
  blend = filling + opacity * (normal - filling)
  change = tf.abs(blend - normal)
  # Not reduce_max: over an axis of three, XLA's takes four times as long.
  red, green, blue = tf.split(change, 3, axis=-1)
  change = tf.maximum(tf.maximum(red, green), blue)
  seen = tf.logical_and(change > 0.0, change >= options.min_contrast)
  mask = tf.logical_and(mask, seen)
  return tf.where(mask, blend, normal), tf.cast(mask, tf.float32)
