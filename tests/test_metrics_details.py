"""The rows of images and defects against the figures they add up to."""

import numpy as np
import pytest
from scipy import ndimage

from dmdd_jax.metrics import details
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results


def _set(levels, seed=0):
  """Maps with ties, and masks of one, two and no regions."""
  rng = np.random.default_rng(seed)
  masks = np.zeros((5, 24, 30), np.uint8)
  masks[0, 3:9, 4:11] = 1
  masks[1, 0:5, 0:5] = 1
  masks[1, 20:, 25:] = 1
  masks[3, 10, 7] = 1
  maps = rng.random(masks.shape) + 0.5 * masks
  return np.floor(maps * levels) / levels, masks


def _by_definition(maps, masks, limit):
  """AU-PRO of each region: its own overlap over the rate of all images."""
  found = []
  normal = maps[masks == 0]
  for index, mask in enumerate(masks):
    labelled, count = ndimage.label(mask, np.ones((3, 3)))
    for number in range(1, count + 1):
      inside = maps[index][labelled == number]
      fpr, overlap = [0.0], [0.0]
      for threshold in np.unique(maps)[::-1]:
        fpr.append(np.mean(normal >= threshold))
        overlap.append(np.mean(inside >= threshold))
      marks = np.append([f for f in fpr if f < limit], limit)
      curve = np.interp(marks, fpr, overlap)
      # At a rate that several thresholds share, the curve is at the highest.
      for k, mark in enumerate(marks[:-1]):
        curve[k] = max(o for f, o in zip(fpr, overlap) if f == mark)
      found.append(np.trapezoid(curve, marks) / limit)
  return found


@pytest.mark.parametrize('levels', [4, 1000])
def test_the_mean_of_the_defects_is_au_pro(levels):
  maps, masks = _set(levels)
  pixels = region.prepare(maps, masks)
  rows = details.defects(pixels, (0.3, 0.05))
  assert [(r['image'], r['region'], r['area']) for r in rows] == [
    (0, 1, 42),
    (1, 1, 25),
    (1, 2, 20),
    (3, 1, 1),
  ]
  assert np.mean([r['au_pro'] for r in rows]) == pytest.approx(
    region.au_pro(pixels, limits=(0.3,))[0], abs=1e-12
  )
  assert np.mean([r['au_pro_005'] for r in rows]) == pytest.approx(
    region.au_pro(pixels, limits=(0.05,))[0], abs=1e-12
  )


@pytest.mark.parametrize('levels', [4, 1000])
def test_a_defects_au_pro_is_that_of_its_definition(levels):
  maps, masks = _set(levels, seed=1)
  rows = details.defects(region.prepare(maps, masks), (0.3,))
  np.testing.assert_allclose(
    [r['au_pro'] for r in rows], _by_definition(maps, masks, 0.3), atol=1e-12
  )


def test_a_defects_box_and_highest_score():
  maps, masks = _set(1000)
  row = details.defects(region.prepare(maps, masks))[2]
  box = np.s_[row['top'] : row['bottom'], row['left'] : row['right']]
  assert masks[1][box].all() and masks[1][box].size == row['area']
  assert row['highest'] == maps[1][box].max()


def test_the_means_of_the_images_are_the_figures_of_the_set():
  maps, masks = _set(1000)
  maps = np.repeat(np.repeat(maps, 20, 1), 20, 2)  # AUPIMO needs many pixels.
  maps = maps + np.random.default_rng(5).random(maps.shape) / 1e4
  masks = np.repeat(np.repeat(masks, 20, 1), 20, 2)
  labels = [1, 1, 0, 1, 0]
  pixels = region.prepare(maps, masks)
  rows = details.images(pixels, labels, details.defects(pixels))
  whole = results.compute(maps, masks, np.arange(5.0), labels)
  assert [row['defects'] for row in rows] == [1, 2, 0, 1, 0]
  assert [row['highest'] for row in rows] == list(maps.max(axis=(1, 2)))
  for name in ('aupimo', 'pro_per_image'):
    values = [row[name] for row in rows]
    assert np.isnan(values).tolist() == [False, False, True, False, True]
    assert np.nanmean(values) == pytest.approx(whole[name])
  by_defect = details.defects(pixels)
  assert rows[1]['au_pro'] == pytest.approx(
    (by_defect[1]['au_pro'] + by_defect[2]['au_pro']) / 2
  )


def test_without_defects_there_are_no_rows_of_them():
  pixels = region.prepare(np.zeros((2, 4, 4)), np.zeros((2, 4, 4), np.uint8))
  assert details.defects(pixels) == []
  assert [row['defects'] for row in details.images(pixels, [0, 0])] == [0, 0]
