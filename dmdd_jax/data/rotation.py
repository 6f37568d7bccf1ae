"""Rotation of batches of images in one TensorFlow op.

Synopsis:

  turned = rotation.rotate(images, tf.cos(angles), tf.sin(angles), 'REFLECT')
"""

import tensorflow as tf


def rotate(
  images: tf.Tensor, cos: tf.Tensor, sin: tf.Tensor, outside: str
) -> tf.Tensor:
  """Rotates square images about their centre, bilinear.

  Args:
    images: (B, S, S, C) float32.
    cos: (B,) cosine of each image's angle.
    sin: (B,) sine of each image's angle; quarter turns (0, 1 and -1) do not
      interpolate.
    outside: fill of the corners, 'REFLECT' for the mirrored image or 'CONSTANT'
      for 0.

  Returns:
    (B, S, S, C) float32.
  """
  center = (images.shape[1] - 1) / 2.0
  x = center - cos * center + sin * center
  y = center - sin * center - cos * center
  zero = tf.zeros_like(cos)
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=images,
    transforms=tf.stack([cos, -sin, x, sin, cos, y, zero, zero], axis=1),
    output_shape=images.shape[1:3],
    interpolation='BILINEAR',
    fill_mode=outside,
    fill_value=0.0,
  )
