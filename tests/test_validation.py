"""Validation pairs: visible defects of kinds that training does not paint."""

import numpy as np
import pytest

from dmdd_jax.data import surfaces
from dmdd_jax.data import validation

SIZE = 64


def _images(count=4):
  return surfaces.procedural_textures(count, SIZE)


def test_pairs_depend_on_the_arguments_alone():
  first, again = (validation.pairs(_images(), seed=1) for _ in range(2))
  for one, other in zip(first, again):
    np.testing.assert_array_equal(one, other)
  for other in (2, -1):
    pairs = validation.pairs(_images(), seed=other)
    assert not np.array_equal(first[1], pairs[1])


@pytest.mark.parametrize(('images', 'pairs'), [(1, 40), (10, 40), (11, 44)])
def test_four_of_each_image_and_at_least_forty_half_of_them_clean(
  images, pairs
):
  pictures, masks = validation.pairs(_images(images), seed=1)
  assert pictures.shape == (pairs, SIZE, SIZE, 3)
  assert masks.shape == (pairs, SIZE, SIZE)
  assert pictures.dtype == masks.dtype == np.uint8
  assert set(np.unique(masks)) == {0, 1}
  defective = masks.any(axis=(1, 2))
  assert 0.4 * pairs <= defective.sum() <= 0.5 * pairs
  # Both come of every image.
  for index in range(images):
    assert len(set(defective[index::images])) == 2


def test_outside_the_mask_only_the_light_differs_and_inside_more_does():
  images = _images()
  pictures, masks = validation.pairs(images, seed=1)
  for number, (picture, mask) in enumerate(zip(pictures, masks)):
    image = images[number % len(images)].astype(np.float64)
    outside = (mask == 0) & (image < 230).all(axis=-1)
    factor = picture[outside].sum() / image[outside].sum()
    assert 0.89 < factor < 1.11
    change = np.abs(picture - np.minimum(factor * image, 255)).max(axis=-1)
    assert change[outside].max() < 2.0
    if mask.any():
      assert change[mask == 1].max() > 255 * 0.02 - 1


@pytest.mark.parametrize('kind', validation.KINDS)
def test_every_kind_changes_a_small_part_of_a_picture(kind):
  image = _images(4)[2].astype(np.float32) / 255
  shares = []
  for seed in range(10):
    rng = np.random.default_rng(seed)
    found, mask = validation._damage(rng, image, kind, None)
    assert found.shape == image.shape
    np.testing.assert_array_equal(found[mask == 0], image[mask == 0])
    shares.append(mask.mean())
  assert 0.001 < np.median(shares) < 0.15 and max(shares) < 0.25


def test_a_defect_begins_on_the_object():
  foreground = np.zeros((1, SIZE, SIZE, 1), np.uint8)
  foreground[:, 40:, 40:] = 1
  _, masks = validation.pairs(_images(1), seed=0, foreground=foreground)
  assert masks.any()
  rows, columns = np.nonzero(masks.any(axis=0))
  assert rows.mean() > 40 and columns.mean() > 40
  # Where the object was not found, anywhere.
  nowhere = np.zeros_like(foreground)
  assert validation.pairs(_images(1), seed=0, foreground=nowhere)[1].any()


def test_a_picture_on_which_nothing_shows_stays_clean():
  black = np.zeros((1, SIZE, SIZE, 3), np.uint8)
  pictures, masks = validation.pairs(black, seed=0)
  changed = pictures.any(axis=(1, 2, 3))
  np.testing.assert_array_equal(changed, masks.any(axis=(1, 2)))
