"""Intervals against other programs, published figures and brute force."""

import math

import numpy as np
import pytest
from scipy import special
from scipy import stats

from dmdd_jax.metrics import intervals
from dmdd_jax.metrics import results


def test_a_share_has_the_interval_of_clopper_and_pearson():
  for count, total in ((0, 60), (4, 60), (60, 60), (1, 1)):
    expected = stats.binomtest(count, total).proportion_ci(0.95, 'exact')
    np.testing.assert_allclose(
      intervals.share(count, total), tuple(expected), atol=1e-9
    )


@pytest.mark.parametrize('value', [0.0, 0.2, 0.5, 0.87, 0.9933, 1.0])
@pytest.mark.parametrize('sizes', [(1, 1), (20, 20), (63, 20), (4, 300)])
def test_the_ends_of_newcombes_method_5_lie_where_its_score_is_1_96(
  value, sizes
):
  def score(theta):
    half = sum(sizes) / 2 - 1
    ones = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
    return abs(value - theta) / math.sqrt(
      theta * (1 - theta) * ones / math.prod(sizes)
    )

  low, high = intervals.auroc(value, *sizes)
  assert 0 <= low <= value <= high <= 1
  assert high - low > 0.01
  for end in (low, high):
    if end not in (0.0, 1.0):
      assert score(end) == pytest.approx(1.959964, abs=1e-4)
  mirrored = intervals.auroc(1 - value, *sizes)
  np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-9)


def test_the_jackknife_of_a_mean_is_students_t():
  """On the logit scale, by the delta method; equal squares: no heavy tail."""
  values = np.tile([0.0, 0.6], 8)
  left_out = (values.sum() - values) / 15
  low, high = intervals.jackknife(0.3, left_out, np.ones(16, int))
  error = values.std(ddof=1) / 4 / (0.3 * 0.7)
  expected = math.log(3 / 7) + stats.t.ppf([0.025, 0.975], 15) * error
  np.testing.assert_allclose((low, high), 1 / (1 + np.exp(-expected)))


def test_a_variance_that_is_one_images_alone_widens_the_interval():
  even = np.tile([1.0, -1.0], 20)
  one = np.where(np.arange(40) == 3, 10.0, 0.01 * even)
  widths = []
  for values in (even, one):
    values = (values - values.mean()) / values.std()
    left_out = 0.5 + 0.01 * values
    ends = intervals.jackknife(0.5, left_out, np.ones(40, int))
    widths.append(np.diff(special.logit(ends))[0])
  ratio = stats.t.ppf(0.975, 3) / stats.t.ppf(0.975, 39)
  assert widths[1] / widths[0] == pytest.approx(ratio, rel=0.01)


def test_a_variance_is_at_least_that_with_one_more_defective_image():
  labels = np.repeat([0, 1], 20)
  values = np.tile([0.0899, 0.0901], 20) + 0.9
  low, high = intervals.jackknife(0.99, values, labels)
  share = 0.99 * 0.01
  variance = 0.15 * share / (20 * 21)
  half = stats.t.ppf(0.975, 19) * math.sqrt(variance) / share
  expected = 1 / (1 + np.exp(-math.log(99) - half * np.array([-1, 1])))
  np.testing.assert_allclose((low, high), expected, rtol=1e-3)


def test_where_there_is_no_interval_there_is_a_reason():
  labels = np.repeat([0, 1], [4, 9])
  some = np.linspace(0.4, 0.6, 13)
  assert '4 good images' in intervals.jackknife(0.5, some, labels)
  assert '4 good' in intervals.average_precision(0.5, some, labels)
  assert '4 defective' in intervals.jackknife(0.5, some, 1 - labels)
  labels = np.repeat([0, 1], [6, 7])
  assert 'it is 1,' in intervals.jackknife(1.0, some, labels)
  assert 'it is 0.5,' in intervals.jackknife(0.5, 0 * some + 0.5, labels)
  assert 'undefined' in intervals.jackknife(0.5, some * np.nan, labels)


def test_ap_has_an_interval_at_1_and_wilsons_where_the_ratio_is_1():
  labels = np.repeat([0, 1], [2000, 2000])
  low, high = intervals.average_precision(1.0, np.ones(4000), labels)
  assert 0.998 < low < 1 == high
  # Values whose jackknife variance is that of a share of 2000: Wilson's.
  values = np.zeros(2000)
  values[:1400] = 1
  left_out = np.append(np.full(2000, 0.7), (1400 - values) / 1999)
  expected = stats.binomtest(1400, 2000).proportion_ci(0.95, 'wilson')
  np.testing.assert_allclose(
    intervals.average_precision(0.7, left_out, labels),
    tuple(expected),
    atol=1e-4,
  )


def _case(images=16, side=24, levels=None, seed=0):
  """(maps, masks, scores, labels); few distinct scores with `levels`."""
  rng = np.random.default_rng(seed)
  labels = (np.arange(images) > images * 2 // 5).astype(int)
  masks = np.zeros((images, side, side), np.uint8)
  for mask in masks[images * 2 // 5 + 1 :]:
    y, x = rng.integers(0, side * 3 // 4, 2)
    mask[y : y + rng.integers(2, side // 4), x : x + side // 6] = 1
  maps = rng.normal(size=masks.shape) + rng.normal(2, 0.7, (images, 1, 1)) * (
    masks
  )
  maps = np.round(maps * levels) if levels else maps
  return maps, masks, rng.normal(size=images) + 0.7 * labels, labels


@pytest.mark.parametrize(
  'options, tolerance',
  [
    # Every distinct score is a threshold: exact.
    ({'levels': 8}, 1e-10),
    # More pixels than the sample that thresholds are taken from.
    ({'levels': 8, 'side': 100}, 1e-10),
    ({'side': 128}, 0.02),
  ],
)
def test_intervals_are_those_of_leaving_out_images_by_brute_force(
  options, tolerance
):
  maps, masks, scores, labels = case = _case(**options)
  found = results.compute(*case)
  draws = [
    results.compute(
      maps[keep], masks[keep], scores[keep], labels[keep], intervals=False
    )
    for keep in ~np.eye(len(labels), dtype=bool)
  ]
  checked = 0
  for name, ends in found['confidence'].items():
    left_out = np.array([one[name] for one in draws])
    if name == 'image_auroc':
      expected = intervals.auroc(
        found[name], labels.sum(), len(labels) - labels.sum()
      )
    elif name == 'image_ap':
      expected = intervals.average_precision(found[name], left_out, labels)
    else:
      expected = intervals.jackknife(found[name], left_out, labels)
    if ends is None:
      assert name in found['no_interval']
      continue
    checked += 1
    assert ends[0] < found[name] < ends[1]
    width = expected[1] - expected[0]
    np.testing.assert_allclose(
      ends, expected, rtol=0, atol=tolerance * width, err_msg=name
    )
  assert checked >= 8
  assert set(found['no_interval']) <= {'image_f1_max', 'aupimo'}


def test_many_images_are_left_out_in_groups_with_about_the_same_interval():
  """The pixels of an image share one score: Hanley and McNeil's setting."""
  rng = np.random.default_rng(1)
  labels = np.arange(1200) % 2
  scores = rng.normal(size=1200) + 1.5 * labels
  maps, masks = scores[:, None, None], labels[:, None, None]
  found = results.compute(maps, masks, scores, labels, extra=())
  # DeLong's variance: of each image's share of won pairs.
  won = scores[labels == 1][:, None] > scores[labels == 0]
  variance = sum(np.var(won.mean(axis), ddof=1) / 600 for axis in (0, 1))
  width = 2 * stats.t.ppf(0.975, 99) * math.sqrt(variance)
  low, high = found['confidence']['pixel_auroc']
  assert high - low == pytest.approx(width, rel=0.2)
  assert high - low != pytest.approx(width, rel=1e-6)


def test_intervals_hold_the_true_value_about_19_times_in_20():
  """60 sets of 20 + 20 images, each figure with its own true value."""
  rng = np.random.default_rng(2)

  def draw(count):
    labels = np.repeat([0, 1], count)
    contrast = rng.normal(3, 0.7, (2 * count, 1))
    base = rng.normal(0, 0.4, (2 * count, 1))
    maps = base + rng.normal(size=(2 * count, 64))
    masks = np.zeros((2 * count, 64), np.uint8)
    masks[count:, :6] = 1
    maps = (maps + masks * contrast)[:, None]
    scores = rng.normal(size=2 * count) + 2.5 * labels
    return maps.astype(np.float32), masks[:, None], scores, labels

  truth = results.compute(*draw(4000), intervals=False)
  names = ('image_auroc', 'image_ap', 'pixel_auroc', 'pixel_ap', 'au_pro')
  held = dict.fromkeys(names, 0)
  for _ in range(60):
    found = results.compute(*draw(20), extra=())['confidence']
    for name in names:
      held[name] += found[name][0] <= truth[name] <= found[name][1]
  for name, count in held.items():
    assert count >= 51, name  # By chance once in 3,000 tests.
