"""Validation pairs: visible defects of kinds that training does not paint."""

import numpy as np
import pytest

from dmdd_jax.data import textures as textures_lib
from dmdd_jax.data import unseen

SIZE = 64


def _images(count=4):
  return textures_lib.procedural_textures(count, SIZE)


def _pairs(images, count=40, **options):
  return unseen.pairs(images, **{'seed': 1, 'count': count, **options})


def test_pairs_depend_on_the_arguments_alone():
  first, again = (_pairs(_images()) for _ in range(2))
  for one, other in zip(first, again):
    np.testing.assert_array_equal(one, other)
  for other in (2, -1):
    assert not np.array_equal(first[1], _pairs(_images(), seed=other)[1])


@pytest.mark.parametrize('images', [1, 5, 8, 10, 11])
def test_half_of_each_images_pictures_are_clean(images):
  pictures, masks = _pairs(_images(images), 4 * images + 8)
  assert pictures.shape == (4 * images + 8, SIZE, SIZE, 3)
  assert masks.shape == (4 * images + 8, SIZE, SIZE)
  assert pictures.dtype == masks.dtype == np.uint8
  assert set(np.unique(masks)) == {0, 1}
  defective = masks.any(axis=(1, 2))
  for index in range(images):
    own = defective[index::images]
    assert 0 < own.sum() <= (len(own) + 1) // 2


@pytest.mark.parametrize('images', [1, 5, 6, 8, 10, 25])
def test_kinds_are_all_there_and_differ_within_an_image(monkeypatch, images):
  seen = []

  def note(rng, image, kind, allowed):
    del rng, allowed
    seen.append((int(image[0, 0, 0] * 256), kind))
    return image, np.zeros(image.shape[:2], np.uint8)

  monkeypatch.setattr(unseen, '_damage', note)
  monkeypatch.setattr(unseen, '_LIGHTING', 0.0)
  shades = np.arange(images, dtype=np.uint8)[:, None, None, None]
  _pairs(np.broadcast_to(shades, (images, 8, 8, 3)), max(40, 4 * images))
  kinds = [kind for _, kind in seen]
  often = [kinds.count(kind) for kind in unseen.KINDS]
  assert min(often) > 0.3 * max(often)
  for image in range(images):
    own = [kind for which, kind in seen if which == image]
    assert len(set(own)) == min(len(own), len(unseen.KINDS))


def test_of_more_images_than_pictures_some_are_drawn():
  images = np.arange(200, dtype=np.uint8)[:, None, None, None]
  images = np.broadcast_to(images, (200, 32, 32, 3))
  pictures, _ = _pairs(images, 10)
  assert len(pictures) == 10
  assert np.ptp(np.median(pictures, axis=(1, 2, 3))) > 50


def test_outside_the_mask_only_the_light_differs_and_inside_more_does():
  image = _images(1)[0].astype(np.float64)
  for picture, mask in zip(*_pairs(_images(1))):
    outside = (mask == 0) & (image < 230).all(axis=-1)
    factor = picture[outside].sum() / image[outside].sum()
    assert 0.89 < factor < 1.11
    change = np.abs(picture - np.minimum(factor * image, 255)).max(axis=-1)
    assert change[outside].max() < 2.0
    if mask.any():
      assert np.mean(change[mask == 1] > 255 * 0.02 - 2) > 0.5


@pytest.mark.parametrize('kind', unseen.KINDS)
def test_every_kind_changes_a_small_part_of_a_picture(kind):
  image = _images(4)[2].astype(np.float32) / 255
  shares = []
  for seed in range(10):
    rng = np.random.default_rng(seed)
    found, mask = unseen._damage(rng, image, kind, None)
    assert found.shape == image.shape
    np.testing.assert_array_equal(found[mask == 0], image[mask == 0])
    shares.append(mask.mean())
  assert 0.001 < np.median(shares) < 0.15 and max(shares) < 0.25


def test_a_defect_begins_on_the_object():
  foreground = np.zeros((1, SIZE, SIZE, 1), np.uint8)
  foreground[:, 40:, 40:] = 1
  _, masks = _pairs(_images(1), foreground=foreground)
  assert masks.any()
  rows, columns = np.nonzero(masks.any(axis=0))
  assert rows.mean() > 40 and columns.mean() > 40
  # As in training, a tile of background has none.
  nowhere = np.zeros_like(foreground)
  assert not _pairs(_images(1), foreground=nowhere)[1].any()


def test_a_picture_on_which_nothing_shows_stays_clean():
  black = np.zeros((1, SIZE, SIZE, 3), np.uint8)
  pictures, masks = _pairs(black)
  changed = pictures.any(axis=(1, 2, 3))
  np.testing.assert_array_equal(changed, masks.any(axis=(1, 2)))
