"""DRAEM's alterations of textures, as batched TensorFlow ops.

Each texture goes through three different alterations of ten, in random order.
The list and its ranges are those of DRAEM's published training code (imgaug's
augmenters). Where imgaug draws among variants, one is taken: brightness is
HSV's value (imgaug draws the colour space). Values are not rounded in between.

Synopsis:

  altered = texture_augment.augment(textures, draws['augment_order'],
                                    draws['augment_values'])
"""

import math

import tensorflow as tf

from dmdd_jax.data import rotation

_SLOTS = 3  # Alterations of one texture.
_SHARE = 3  # Random numbers each of them may use.
VALUES = _SLOTS * _SHARE


def augment(
  images: tf.Tensor, order: tf.Tensor, values: tf.Tensor
) -> tf.Tensor:
  """Alters each image by three of the ten, drawn without replacement.

  Args:
    images: (B, S, S, 3) float32 in [0, 1].
    order: (B, COUNT) in [0, 1); the three highest are the alterations, in their
      order.
    values: (B, VALUES) in [0, 1), the random numbers of the alterations.

  Returns:
    (B, S, S, 3) float32 in [0, 1].
  """
  chosen = tf.math.top_k(order, _SLOTS).indices
  for slot in range(_SLOTS):
    drawn = values[:, slot * _SHARE : (slot + 1) * _SHARE]
    # Each alteration sees only its own rows: three passes, not thirty.
    places, parts = [], []
    for index, alter in enumerate(_ALTERATIONS):
      rows = tf.where(chosen[:, slot] == index)[:, 0]
      places.append(rows)
      parts.append(alter(tf.gather(images, rows), tf.gather(drawn, rows)))
    parts = [tf.clip_by_value(part, 0.0, 1.0) for part in parts]
    back = tf.argsort(tf.concat(places, axis=0))
    shape = images.shape
    images = tf.gather(tf.concat(parts, axis=0), back)
    images = tf.ensure_shape(images, shape)
  return images


def _between(low: float, high: float, drawn: tf.Tensor) -> tf.Tensor:
  """Scales (B,) in [0, 1) to [low, high), as (B, 1, 1, 1)."""
  return (low + (high - low) * drawn)[:, None, None, None]


def gamma(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Raises each channel to a power of its own, 0.5 to 2."""
  return images ** (0.5 + 1.5 * drawn[:, None, None, :3])


def brightness(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Multiplies HSV's value by 0.8 to 1.2 and adds -30 to 30 of 255."""
  hue, saturation, value = tf.unstack(tf.image.rgb_to_hsv(images), axis=-1)
  factor = _between(0.8, 1.2, drawn[:, 0])[..., 0]
  shift = _between(-30.0, 30.0, drawn[:, 1])[..., 0] / 255.0
  value = tf.clip_by_value(value * factor + shift, 0.0, 1.0)
  return tf.image.hsv_to_rgb(tf.stack([hue, saturation, value], axis=-1))


def sharpness(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Pillow's sharpness, factor 0 (smoothed) to 2 (sharpened)."""
  size = images.shape[1]
  centre = images[:, 1:-1, 1:-1]
  # Pillow's kernel: 5 in the middle, 1 around it, over 13. No convolution op:
  # on an empty batch its shape is wrong.
  total = 4.0 * centre
  for y in range(3):
    for x in range(3):
      total += images[:, y : size - 2 + y, x : size - 2 + x]
  inner = total / 13.0 - centre
  # The outermost pixels stay as they are, as in Pillow.
  change = tf.pad(inner, [[0, 0], [1, 1], [1, 1], [0, 0]])
  return images + (1.0 - _between(0.0, 2.0, drawn[:, 0])) * change


def hue_and_saturation(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Adds -50 to 50 of 255 to both; hue wraps round."""
  hue, saturation, value = tf.unstack(tf.image.rgb_to_hsv(images), axis=-1)
  shifts = (100.0 * drawn[:, :2] - 50.0) / 255.0
  hue = tf.math.floormod(hue + shifts[:, 0, None, None], 1.0)
  saturation += shifts[:, 1, None, None]
  saturation = tf.clip_by_value(saturation, 0.0, 1.0)
  return tf.image.hsv_to_rgb(tf.stack([hue, saturation, value], axis=-1))


def solarize(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Inverts, in half of the images, values above 32 to 128 of 255."""
  threshold = _between(32.0, 128.0, drawn[:, 1]) / 255.0
  happens = (drawn[:, 0] < 0.5)[:, None, None, None]
  inverted = tf.logical_and(happens, images >= threshold)
  return tf.where(inverted, 1.0 - images, images)


def posterize(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Keeps the highest 1 to 8 bits of eight."""
  step = 2.0 ** (7.0 - tf.floor(8.0 * drawn[:, 0]))[:, None, None, None]
  return tf.floor(tf.round(255.0 * images) / step) * step / 255.0


def invert(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Inverts all values."""
  del drawn
  return 1.0 - images


def autocontrast(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Stretches each channel to its range; clips up to 20 % at either end."""
  pixels = images.shape[1] * images.shape[2]
  flat = tf.sort(tf.reshape(images, [-1, pixels, 3]), axis=1)
  cut = tf.cast(0.2 * drawn[:, 0] * pixels, tf.int32)
  low = tf.gather(flat, cut, axis=1, batch_dims=1)[:, None, None, :]
  high = tf.gather(flat, pixels - 1 - cut, axis=1, batch_dims=1)
  span = high[:, None, None, :] - low
  stretched = (images - low) / tf.maximum(span, 1.0 / 255.0)
  return tf.where(span > 0.0, stretched, images)


def equalize(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Equalizes each channel's histogram over 256 levels, as Pillow does."""
  del drawn
  pixels = images.shape[1] * images.shape[2]
  levels = tf.cast(tf.round(255.0 * images), tf.int32)
  flat = tf.reshape(tf.transpose(levels, [0, 3, 1, 2]), [-1, pixels])
  rows = tf.shape(flat)[0]
  offset = 256 * tf.range(rows)[:, None]
  counts = tf.math.bincount(
    tf.reshape(flat + offset, [-1]), minlength=256 * rows
  )
  counts = tf.reshape(counts[: 256 * rows], [-1, 256])
  last = tf.reduce_max(flat, axis=1)
  top = tf.gather(counts, last, axis=1, batch_dims=1)
  step = (pixels - top) // 255
  before = tf.cumsum(counts, axis=1, exclusive=True)
  table = (step[:, None] // 2 + before) // tf.maximum(step, 1)[:, None]
  table = tf.minimum(table, 255)
  even = tf.gather(table, flat, axis=1, batch_dims=1)
  even = tf.where(step[:, None] > 0, even, flat)
  even = tf.reshape(even, [-1, 3, images.shape[1], images.shape[2]])
  return tf.cast(tf.transpose(even, [0, 2, 3, 1]), tf.float32) / 255.0


def rotate(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
  """Turns by -45 to 45 degrees, black outside."""
  angles = (2.0 * drawn[:, 0] - 1.0) * math.radians(45.0)
  return rotation.rotate(images, tf.cos(angles), tf.sin(angles), 'CONSTANT')


_ALTERATIONS = (
  gamma,
  brightness,
  sharpness,
  hue_and_saturation,
  solarize,
  posterize,
  invert,
  autocontrast,
  equalize,
  rotate,
)
COUNT = len(_ALTERATIONS)
