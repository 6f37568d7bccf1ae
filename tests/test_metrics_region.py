"""AU-PRO, sPRO, AUPIMO and per-image PRO against their definitions."""

import hypothesis
from hypothesis import strategies as st
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from dmdd_jax.metrics import aupimo as aupimo_lib
from dmdd_jax.metrics import region
from dmdd_jax.metrics import spro as spro_lib
from dmdd_jax.metrics import store as store_lib

_FEW = hypothesis.settings(max_examples=40, deadline=None)


def _regions(mask):
  """8-connected regions by flood fill: a list of sets of pixels."""
  left = {tuple(pixel) for pixel in np.argwhere(mask)}
  found = []
  while left:
    region_pixels, front = set(), [left.pop()]
    while front:
      y, x = front.pop()
      region_pixels.add((y, x))
      near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
      left -= near
      front += near
    found.append(region_pixels)
  return found


def _area(points, limit):
  """Trapezoid over a list of (x, y) up to the limit, divided by it."""
  area = 0.0
  for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
    if x0 >= limit:
      break
    if x1 > limit:
      x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
    area += (x1 - x0) * (y0 + y1) / 2
  return area / limit


def _brute_pro(maps, masks, limit, saturate=None):
  """AU-PRO threshold by threshold; `saturate(area)` makes it sPRO."""
  regions = [
    (k, tuple(np.array(sorted(pixels)).T))
    for k, mask in enumerate(masks)
    for pixels in _regions(mask)
  ]
  normal = [m[k == 0] for m, k in zip(maps, masks, strict=True)]
  normal = np.concatenate(normal)
  points = [(0.0, 0.0)]
  for mark in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
    overlaps = []
    for k, pixels in regions:
      found, area = (maps[k][pixels] >= mark).sum(), len(pixels[0])
      area = saturate(area) if saturate else area
      overlaps.append(min(found / area, 1))
    points.append(((normal >= mark).mean(), np.mean(overlaps)))
  return _area(points, limit)


def _brute_aupimo(maps, masks, bounds):
  """AUPIMO threshold by threshold, NaN on images without defects."""
  good = [m for m, k in zip(maps, masks, strict=True) if not k.any()]
  values = []
  for anomaly_map, mask in zip(maps, masks, strict=True):
    if not mask.any():
      values.append(np.nan)
      continue
    points = [
      (0.0, (anomaly_map[mask > 0] > max(m.max() for m in good)).mean())
    ]
    for mark in np.unique(np.concatenate([m.ravel() for m in good]))[::-1]:
      rate = np.mean([(m >= mark).mean() for m in good])
      # The overlap moves between two marks without a change of the rate.
      points.append((points[-1][0], (anomaly_map[mask > 0] > mark).mean()))
      points.append((rate, (anomaly_map[mask > 0] >= mark).mean()))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
      left, right = max(x0, bounds[0]), min(x1, bounds[1])
      if left >= right:
        continue
      if x0 == 0:
        area += np.log(right / left) * y0
        continue
      heights = np.interp(np.log([left, right]), np.log([x0, x1]), [y0, y1])
      area += np.log(right / left) * heights.mean()
    values.append(area / np.log(bounds[1] / bounds[0]))
  return np.array(values)


@st.composite
def _sets(draw, images=4, side=7, levels=9):
  """Maps with many ties and masks: defects, anomaly-free pixels, a good one."""
  shape = (images, side, side)
  maps = draw(hnp.arrays(np.float32, shape, elements=st.integers(0, levels)))
  masks = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))
  masks[0] = 0
  masks[1, 0, 0] = 1
  return maps, masks


def _blobs(seed, images=8, side=24):
  """Distinct scores, rectangles as defects, the first images good."""
  rng = np.random.default_rng(seed)
  masks = np.zeros((images, side, side), np.uint8)
  for mask in masks[images // 3 :]:
    for _ in range(3):
      y, x = rng.integers(0, side - 5, 2)
      mask[y : y + rng.integers(1, 6), x : x + rng.integers(1, 6)] = 1
  maps = rng.normal(size=masks.shape) + 1.5 * masks
  return maps.astype(np.float32), masks


@_FEW
@hypothesis.given(_sets(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_au_pro_is_its_definition(case, limit):
  maps, masks = case
  np.testing.assert_allclose(
    region.au_pro(maps, masks, (limit,)), [_brute_pro(maps, masks, limit)]
  )


def test_au_pro_without_ties_is_its_definition():
  maps, masks = _blobs(0)
  expected = [_brute_pro(maps, masks, limit) for limit in (0.3, 0.05, 1)]
  pixels = region.prepare(maps, masks)
  np.testing.assert_allclose(
    region.au_pro(pixels, None, (0.3, 0.05, 1)), expected
  )
  np.testing.assert_allclose(
    region.au_pro(pixels, limits=(0.05,)), expected[1:2]
  )


def test_au_pro_by_hand():
  # Two regions of 1 and 2 pixels that touch neither by corner; 5 normal ones.
  masks = np.array([[[1, 0, 1, 1], [0, 0, 0, 0]]])
  maps = np.array([[[9, 8, 7, 3], [6, 5, 4, 2]]], float)
  # FPR 0: PRO .5; FPR .2 (at 8): .5, then .75 (at 7); FPR .8 (at 4), then 1.
  assert region.au_pro(maps, masks, (1,))[0] == pytest.approx(
    0.2 * 0.5 + 0.6 * 0.75 + 0.2 * 1
  )
  assert region.au_pro(maps, masks, (0.5,))[0] == pytest.approx(
    (0.2 * 0.5 + 0.3 * 0.75) / 0.5
  )


def test_pro_is_interpolated_inside_a_tie():
  # All pixels tie: the curve is the diagonal, its mean to any limit limit/2.
  masks = np.zeros((1, 4, 4), int)
  masks[0, 0, 0] = 1
  maps = np.zeros((1, 4, 4))
  np.testing.assert_allclose(
    region.au_pro(maps, masks, (0.3, 0.05, 1)), [0.15, 0.025, 0.5]
  )


def test_regions_are_8_connected():
  # One diagonal region, half found before any false positive, is PRO .5; as
  # two regions of different size it would not be.
  masks = np.array([[[1, 0, 0], [0, 1, 1], [0, 0, 1]]])
  maps = masks * 5.0 + np.array([[[4, 0, 0], [0, 4, 0], [0, 0, 0]]])
  maps[0, 1, 2] = maps[0, 2, 2] = -1
  assert region.au_pro(maps, masks, (0.3,))[0] == pytest.approx(0.5)


def test_saturating_maps_are_exact():
  # A saturating head: nearly all of the order lies within 1e-3 of 1, where
  # equal-width bins lose it.
  maps, masks = _blobs(1)
  squashed = 1 - np.exp(-3 * (maps.astype(np.float64) + 4))
  found = region.au_pro(squashed, masks)
  np.testing.assert_allclose(
    found, [_brute_pro(squashed, masks, limit) for limit in (0.3, 0.05)]
  )
  np.testing.assert_allclose(found, region.au_pro(maps, masks))
  bins = np.floor(squashed * 1000)
  assert region.au_pro(bins, masks)[0] < found[0] - 0.1
  # Clipped at the top in float32: one score holds many pixels of both kinds.
  clipped = np.minimum(maps, 1)
  np.testing.assert_allclose(
    region.au_pro(clipped, masks, (0.3,)), [_brute_pro(clipped, masks, 0.3)]
  )


def test_monotone_transform_image_order_and_good_images():
  maps, masks = _blobs(2)
  expected = region.au_pro(maps, masks)
  order = np.random.default_rng(0).permutation(len(maps))
  moved = np.exp(maps.astype(np.float64))[order]
  np.testing.assert_allclose(region.au_pro(moved, masks[order]), expected)
  pimo = aupimo_lib.aupimo(maps, masks, bounds=(0.01, 0.2))
  moved = aupimo_lib.aupimo(moved, masks[order], bounds=(0.01, 0.2))
  np.testing.assert_allclose(moved, pimo[order])
  # A good image with high scores must lower the official PRO.
  worse = np.concatenate([maps, maps[:1] + 9])
  masks = np.concatenate([masks, masks[:1]])
  assert region.au_pro(worse, masks)[0] < expected[0] - 0.1
  np.testing.assert_array_equal(
    region.pro_per_image(worse, masks)[:-1],
    region.pro_per_image(maps, masks[:-1]),
  )


def test_native_sizes_pool_all_pixels():
  rng = np.random.default_rng(3)
  shapes = [(5, 9), (12, 4), (7, 7), (3, 20)]
  maps = [rng.integers(0, 9, shape).astype(np.float32) for shape in shapes]
  masks = [(rng.random(shape) < 0.2).astype(np.uint8) for shape in shapes]
  masks[2][:] = 0
  np.testing.assert_allclose(
    region.au_pro(maps, masks, (0.3,)), [_brute_pro(maps, masks, 0.3)]
  )


def test_curve_has_the_area():
  maps, masks = _blobs(4)
  fpr, pro = region.pro_curve(maps, masks)
  assert (fpr[0], pro[0], fpr[-1], pro[-1]) == (0, 0, 1, pytest.approx(1))
  assert (np.diff(fpr) >= 0).all() and (np.diff(pro) >= 0).all()
  points = list(zip(fpr, pro, strict=True))
  assert _area(points, 0.3) == pytest.approx(region.au_pro(maps, masks)[0])
  few = region.pro_curve(maps, masks, points=100)
  assert len(few[0]) <= 102
  assert np.isin(np.stack(few, 1), np.stack([fpr, pro], 1)).all()
  assert np.trapezoid(few[1], few[0]) == pytest.approx(
    np.trapezoid(pro, fpr), abs=0.02
  )


@_FEW
@hypothesis.given(_sets(), st.sampled_from([(0.02, 0.3), (0.1, 0.9)]))
def test_aupimo_is_its_definition(case, bounds):
  maps, masks = case
  if masks[2:].any((1, 2)).all():
    masks[2] = 0
  np.testing.assert_allclose(
    aupimo_lib.aupimo(maps, masks, bounds=bounds),
    _brute_aupimo(maps, masks, bounds),
    atol=1e-12,
  )


def test_aupimo_when_one_normal_image_has_all_the_alarms():
  maps, masks = _blobs(11, images=9)
  maps[0] += 3
  np.testing.assert_allclose(
    aupimo_lib.aupimo(maps, masks, bounds=(0.01, 0.3)),
    _brute_aupimo(maps, masks, (0.01, 0.3)),
  )


def test_aupimo_weighs_normal_images_alike():
  # Shared FPR is the mean of the images' rates: the small image counts as much.
  rng = np.random.default_rng(5)
  shapes = [(4, 4), (20, 20), (9, 9)]
  maps = [rng.normal(size=shape) for shape in shapes]
  masks = [np.zeros(shape, int) for shape in shapes]
  masks[2][2:5, 2:5] = 1
  np.testing.assert_allclose(
    aupimo_lib.aupimo(maps, masks, bounds=(0.01, 0.4)),
    _brute_aupimo(maps, masks, (0.01, 0.4)),
  )


def test_aupimo_drops_low_scores_on_the_way(monkeypatch):
  maps, masks = _blobs(10, images=20)
  expected = aupimo_lib.aupimo(maps, masks, bounds=(0.01, 0.1))
  monkeypatch.setattr(aupimo_lib, '_TOP_PIXELS', 100)
  found = aupimo_lib.aupimo(maps, masks, bounds=(0.01, 0.1))
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_aupimo_at_the_papers_bounds_is_the_sampled_one():
  """The reference package's procedure: 300,000 equal steps, trapezoid."""
  rng = np.random.default_rng(6)
  maps = rng.normal(size=(8, 256, 256)).astype(np.float32)
  masks = np.zeros(maps.shape, np.uint8)
  masks[6:, 50:120, 30:90] = 1
  maps[6:] += 4.2 * masks[6:]
  normal = np.sort(maps[:6].ravel())
  marks = np.linspace(normal[0], normal[-1], 300_000)
  rate = 1 - np.searchsorted(normal, marks) / normal.size
  ends = [np.argmin(np.abs(rate - bound)) for bound in (1e-4, 1e-5)]
  part = slice(ends[0], ends[1] + 1)
  for index, value in enumerate(aupimo_lib.aupimo(maps, masks)):
    if index < 6:
      assert np.isnan(value)
      continue
    defect = np.sort(maps[index][masks[index] > 0])
    overlap = 1 - np.searchsorted(defect, marks[part]) / defect.size
    sampled = np.trapezoid(overlap[::-1], np.log(rate[part])[::-1]) / np.log(10)
    assert 0.05 < value < 0.95
    assert value == pytest.approx(sampled, abs=0.02)


def test_aupimo_by_hand():
  maps = [np.arange(1.0, 11.0)[None], np.array([[10.5, 9.5, 8.5, 0.0]])]
  masks = [np.zeros((1, 10), int), np.array([[1, 1, 0, 0]])]
  value = aupimo_lib.aupimo(maps, masks, bounds=(0.05, 0.4))[1]
  # Below a rate of .1 no normal pixel may be found: the mark is above 10 and
  # finds 10.5 alone; from .1 on it goes down to just above 9 and finds both.
  expected = np.log(0.1 / 0.05) * 0.5 + np.log(0.4 / 0.1) * 1.0
  assert value == pytest.approx(expected / np.log(8))


@pytest.mark.parametrize('share', [0.3, 0.5, 1.0])
@_FEW
@hypothesis.given(case=_sets(images=3, side=6))
def test_spro_is_its_definition(share, case):
  maps, masks = case

  def saturate(area):
    return max(1, int(share * area))

  regions = []
  for mask in masks:
    pairs = []
    for pixels in _regions(mask):
      one = np.zeros(mask.shape, int)
      one[tuple(np.array(sorted(pixels)).T)] = 1
      pairs.append((one, saturate(len(pixels))))
    regions.append(pairs)
  found = spro_lib.spro(maps, regions, (0.3, 1.0))
  expected = [_brute_pro(maps, masks, t, saturate) for t in (0.3, 1.0)]
  np.testing.assert_allclose(found, expected)
  if share == 1:
    np.testing.assert_allclose(found, region.au_pro(maps, masks, (0.3, 1.0)))


def test_spro_overlapping_regions_by_hand():
  maps = [np.array([[5.0, 4.0, 3.0, 2.0, 1.0]])]
  a, b = np.array([[1, 1, 0, 0, 0]]), np.array([[0, 1, 0, 1, 0]])
  # a saturates at its first pixel (5). b needs both: half at 4, whole at 2,
  # after one of the two normal pixels.
  found = spro_lib.spro(maps, [[(a, 1), (b, 2)]], (1.0,))[0]
  assert found == pytest.approx(0.5 * 0.75 + 0.5 * 1)


def test_pro_per_image_is_the_published_loop():
  maps, masks = _blobs(7)
  found = region.pro_per_image(maps, masks)
  for anomaly_map, mask, value in zip(maps, masks, found, strict=True):
    if not mask.any():
      assert np.isnan(value)
      continue
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    rates, overlaps = [], []
    for mark in np.arange(low, high, (high - low) / 200):
      binary = anomaly_map > mark
      rates.append(binary[mask == 0].mean())
      overlaps.append(
        np.mean([np.mean([binary[p] for p in r]) for r in _regions(mask)])
      )
    rates, overlaps = np.array(rates), np.array(overlaps)
    keep = rates < 0.3
    expected = sklearn_metrics.auc(
      rates[keep] / rates[keep].max(), overlaps[keep]
    )
    assert value == pytest.approx(expected)


def test_pro_per_image_is_undefined_on_constant_maps():
  masks = np.zeros((1, 4, 4), int)
  masks[0, 1, 1] = 1
  assert np.isnan(region.pro_per_image(np.ones((1, 4, 4)), masks)[0])


def test_undefined_sets():
  maps = np.random.default_rng(8).normal(size=(2, 4, 4))
  for mask in (np.zeros_like(maps), np.ones_like(maps)):
    assert np.isnan(region.au_pro(maps, mask)).all()
    assert np.isnan(aupimo_lib.aupimo(maps, mask)).all()
    with pytest.raises(ValueError, match='both defect and anomaly-free'):
      region.pro_curve(maps, mask)
  assert np.isnan(spro_lib.spro(maps, [[], []])).all()
  few = np.zeros_like(maps)
  few[1, 0, 0] = 1
  pixels = region.prepare(maps, few)
  reason = aupimo_lib.aupimo_undefined(pixels, ~pixels.defective)
  assert 'above the upper bound' in reason


def test_bad_input_is_named():
  maps, masks = np.zeros((2, 4, 4)), np.zeros((2, 4, 4), int)
  with pytest.raises(ValueError, match='2 maps and 1 masks'):
    region.prepare(maps, masks[:1])
  with pytest.raises(ValueError, match=r'image 1: .*\(4, 4\).*\(4, 5\)'):
    region.prepare(list(maps), [masks[0], np.zeros((4, 5))])
  with pytest.raises(ValueError, match='mask of image 1 holds 255'):
    region.prepare(maps, np.stack([masks[0], masks[1] + 255]))
  with pytest.raises(ValueError, match='mask of image 0 is None'):
    region.prepare(maps, [None, masks[1]])
  hidden = np.ma.masked_array(masks[1], masks[1] == 0)
  with pytest.raises(ValueError, match='mask of image 1 is a masked array'):
    region.prepare(maps, [masks[0], hidden])
  with pytest.raises(ValueError, match='map of image 0 is a masked array'):
    region.prepare([hidden, maps[1]], masks)
  with pytest.raises(ValueError, match='map of image 1 holds 16 values'):
    region.prepare(np.stack([maps[0], maps[1] + np.nan]), masks)
  with pytest.raises(ValueError, match=r'\(4, 4, 1\), expected \(H, W\)'):
    region.prepare(maps[..., None], masks[..., None])
  with pytest.raises(ValueError, match=r'limit 0 is not in \(0, 1\]'):
    region.au_pro(maps, masks, limits=(0,))
  with pytest.raises(ValueError, match='saturation area 0'):
    spro_lib.spro(maps, [[], [(np.ones((4, 4)), 0)]])


def test_many_regions_need_a_wider_index():
  mask = np.zeros((64, 64), np.uint8)
  mask[::2, ::2] = 1
  found, areas, corner = region.label_regions(mask)
  assert found.shape == (63, 63) and corner == (0, 0)
  assert found.dtype == np.uint16 and len(areas) == 1024
  np.testing.assert_array_equal(np.bincount(found.ravel())[1:], areas)


def test_store_gives_the_same_regions(tmp_path):
  maps, masks = _blobs(9)
  with store_lib.MapStore(limit_bytes=0, directory=tmp_path) as store:
    for pair in zip(maps, masks, strict=True):
      store.append(*pair)
    np.testing.assert_allclose(
      region.au_pro(store), region.au_pro(maps, masks), rtol=1e-13
    )
