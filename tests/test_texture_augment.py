"""DRAEM's texture alterations against Pillow, NumPy and their definitions."""

import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest
import synthesis_helpers
import tensorflow as tf

from dmdd_jax.data import synthesis
from dmdd_jax.data import texture_augment

SIZE = 32


def _bytes(count=4, seed=0):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 200, (count, 8, 8, 3))
  fine = rng.integers(0, 56, (count, SIZE, SIZE, 3))
  return (coarse.repeat(4, 1).repeat(4, 2) + fine).astype(np.uint8)


def _apply(alter, images, drawn):
  floats = tf.constant(np.float32(images) / np.float32(255))
  drawn = tf.constant(np.float32(drawn))
  return 255.0 * tf.clip_by_value(alter(floats, drawn), 0.0, 1.0).numpy()


def _drawn(count=4, seed=1):
  return np.random.default_rng(seed).random((count, 3))


def test_sharpness_is_pillows():
  images, drawn = _bytes(), _drawn()
  found = _apply(texture_augment.sharpness, images, drawn)
  for image, (first, *_), ours in zip(images, drawn, found):
    pillow = ImageEnhance.Sharpness(Image.fromarray(image)).enhance(2 * first)
    np.testing.assert_allclose(ours, np.asarray(pillow), atol=2.5)


def test_equalize_is_pillows():
  images = _bytes()
  images[3] = 77  # One level: nothing to make even.
  found = _apply(texture_augment.equalize, images, _drawn())
  for image, ours in zip(images, found):
    pillow = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    np.testing.assert_allclose(ours, pillow, atol=0.01)


def test_autocontrast_is_pillows():
  images, drawn = _bytes(), _drawn()
  images[3] = 77
  found = _apply(texture_augment.autocontrast, images, drawn)
  for image, (first, *_), ours in zip(images, drawn, found):
    cutoff = 20.0 * first
    pillow = ImageOps.autocontrast(Image.fromarray(image), cutoff)
    # Pillow keeps half of a level that the cut divides; a level is some 1.5.
    np.testing.assert_allclose(ours, np.asarray(pillow), atol=6.0)


def test_colours_are_shifted_as_hsv_says():
  images, drawn = _bytes(), _drawn()
  hsv = tf.image.rgb_to_hsv(np.float32(images) / 255).numpy()
  value = hsv[..., 2] * (0.8 + 0.4 * drawn[:, 0, None, None])
  value = np.clip(value + (60 * drawn[:, 1, None, None] - 30) / 255, 0, 1)
  found = _apply(texture_augment.brightness, images, drawn)
  np.testing.assert_allclose(found.max(axis=-1), 255 * value, atol=0.01)
  found = _apply(texture_augment.hue_and_saturation, images, drawn)
  after = tf.image.rgb_to_hsv(np.float32(found) / 255).numpy()
  np.testing.assert_allclose(after[..., 2], hsv[..., 2], atol=1e-4)
  shift = (100 * drawn[:, 1, None, None] - 50) / 255
  expected = np.clip(hsv[..., 1] + shift, 0, 1)
  np.testing.assert_allclose(after[..., 1], expected, atol=1e-3)
  turned = (after[..., 0] - hsv[..., 0]) % 1.0
  expected = np.broadcast_to(
    ((100 * drawn[:, 0, None, None] - 50) / 255) % 1.0, turned.shape
  )
  clear = (after[..., 1] > 0.05) & (hsv[..., 1] > 0.05)
  away = np.abs(turned - expected)
  assert np.minimum(away, 1 - away)[clear].max() < 1e-3


def test_the_pointwise_ones():
  images, drawn = _bytes(), _drawn()
  unit = images / 255.0
  found = _apply(texture_augment.gamma, images, drawn)
  powers = 0.5 + 1.5 * drawn[:, None, None, :]
  np.testing.assert_allclose(found, 255 * unit**powers, atol=0.01)
  found = _apply(texture_augment.invert, images, drawn)
  np.testing.assert_allclose(found, 255 - np.float64(images), atol=0.01)
  drawn[:, 0] = (0.1, 0.2, 0.6, 0.9)
  found = _apply(texture_augment.solarize, images, drawn)
  threshold = 32 + 96 * drawn[:, 1, None, None, None]
  expected = np.where(images >= threshold, 255.0 - images, images)
  expected[2:] = images[2:]
  np.testing.assert_allclose(found, expected, atol=0.01)
  drawn[:, 0] = (0.0, 0.3, 0.99, 0.5)
  found = _apply(texture_augment.posterize, images, drawn)
  for image, bits, ours in zip(images, (1, 3, 8, 5), found):
    pillow = ImageOps.posterize(Image.fromarray(image), bits)
    np.testing.assert_allclose(ours, np.asarray(pillow), atol=0.01)


def test_a_turn_is_about_the_centre_and_black_outside():
  white = np.full((2, SIZE, SIZE, 3), 255, np.uint8)
  found = _apply(texture_augment.rotate, white, [[0.0, 0, 0], [0.5, 0, 0]])
  np.testing.assert_allclose(found[1], 255)
  assert found[0][0, 0].max() == 0 and found[0][16, 16].min() == 255
  # A square turned by 45 degrees fills 2 (sqrt(2) - 1) of itself.
  share = found[0].mean() / 255
  assert share == pytest.approx(2 * (2**0.5 - 1), abs=0.02)


def test_three_different_ones_in_the_order_drawn():
  images = _bytes(6)
  order = np.random.default_rng(3).random((6, texture_augment.COUNT))
  order[0, 0], order[0, 6], order[0, 5] = 0.999, 0.99, 0.98
  order[0, np.setdiff1d(np.arange(10), (0, 5, 6))] *= 0.9
  values = np.random.default_rng(4).random((6, texture_augment.VALUES))
  arguments = [tf.constant(np.float32(a)) for a in (order, values)]
  floats = tf.constant(np.float32(images) / np.float32(255))
  found = texture_augment.augment(floats, *arguments).numpy()
  assert found.shape == images.shape
  assert found.min() >= 0 and found.max() <= 1
  one, slot = floats[:1], arguments[1][:1]
  one = texture_augment.gamma(one, slot[:, :3])
  one = texture_augment.invert(one, slot[:, 3:6])
  one = texture_augment.posterize(one, slot[:, 6:9])
  np.testing.assert_allclose(found[:1], one, atol=1e-6)
  # An image's result does not depend on what it is batched with.
  for rows in ([4], [5, 0, 2]):
    parts = [tf.gather(a, rows) for a in (floats, *arguments)]
    np.testing.assert_allclose(
      texture_augment.augment(*parts), found[rows], atol=1e-6
    )


def test_it_changes_the_fillings_and_nothing_else():
  draws = synthesis.draw(
    0, tf.range(24, dtype=tf.int64), tf.zeros(24, tf.int64)
  )
  normal = np.zeros((24, SIZE, SIZE, 3), np.float32)
  textures = np.maximum(_bytes(3), 1)
  plain, altered = (
    synthesis.synthesize(
      tf.constant(normal),
      tf.constant(textures),
      draws,
      synthesis_helpers.perlin_options(
        image_size=SIZE, opacity_max=0.0, min_contrast=0.0, **fields
      ),
    )
    for fields in ({}, {'texture_augment': True})
  )
  # A pixel that an alteration made black is no anomaly on black.
  assert not (altered[1].numpy() > plain[1].numpy()).any()
  both = (altered[1].numpy() * plain[1].numpy())[..., 0] == 1
  assert both.sum() > 0.5 * plain[1].numpy().sum()
  changed = np.abs(plain[0] - altered[0]).max(axis=-1)[both] > 1 / 255
  assert changed.mean() > 0.8


def test_the_later_draws_do_not_move_the_others(monkeypatch):
  examples, epochs = tf.range(5, dtype=tf.int64), tf.ones(5, tf.int64)
  before = synthesis.draw(7, examples, epochs)
  more = {**synthesis._LATER_DRAWS, 'more': 4}
  monkeypatch.setattr(synthesis, '_LATER_DRAWS', more)
  after = synthesis.draw(7, examples, epochs)
  for name in synthesis._DRAWS:
    np.testing.assert_array_equal(after[name], before[name])
  later = np.concatenate(
    [after[name].numpy().ravel() for name in more], axis=None
  )
  assert not np.isin(later, after['angles']).any()


def test_the_default_draws_are_those_of_the_first_release():
  """Its first and last numbers; a change here changes every trained result."""
  draws = synthesis.draw(
    3, tf.constant([5], tf.int64), tf.constant([2], tf.int64)
  )
  total = sum(synthesis._DRAWS.values())
  half = (total + 1) // 2
  key = (tf.constant([3], tf.uint32), tf.constant([5], tf.uint32))
  for name, place, index in (('turn', 0, 0), ('angles', -1, total - 1)):
    counter = tf.constant([index % half], tf.uint32)
    words = synthesis.threefry(key, (tf.constant([2], tf.uint32), counter))
    expected = (int(words[index // half][0]) >> 8) * 2.0**-24
    assert float(draws[name][0, place]) == expected
