"""Thresholds and scales from held-out normals, against brute force."""

import json
import math

import model_helpers
import numpy as np
import pytest
from scipy import stats

from dmdd_jax.scoring import calibration
from dmdd_jax.scoring import score as score_lib


def just_above(value):
  """The float32 after a value."""
  return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def brute_force_threshold(values, rate):
  """The lowest float32 that at most `rate` of the values reaches.

  It lies just above one of the values, or it could be lower.
  """
  flat = np.float32(np.ravel(values)).tolist()
  fits = [
    just_above(value)
    for value in flat
    if sum(v >= just_above(value) for v in flat) <= rate * len(flat)
  ]
  return min(fits)


@pytest.mark.parametrize(
  'values, rate, highest_normal',
  [
    ([3.0, 1.0, 2.0], 0.0, 3.0),
    ([3.0, 1.0, 2.0], 0.3, 3.0),
    ([3.0, 1.0, 2.0], 0.34, 2.0),
    ([5.0], 0.5, 5.0),
    ([1.0, 1.0, 1.0, 2.0], 0.25, 1.0),
    # One may lie above, but two are tied at the top.
    ([1.0, 2.0, 2.0], 0.34, 2.0),
    ([7.0, 7.0, 7.0], 0.9, 7.0),
    (np.arange(100.0), 0.01, 98.0),
    # 0.29 * 100 is 28.999999999999996 in floating point: 29 are meant.
    (np.arange(100.0), 0.29, 70.0),
    (np.arange(99.0), 0.01, 98.0),
    ([-1.0, -3.0], 0.5, -3.0),
    ([0.0, 0.0], 0.0, 0.0),
  ],
)
def test_threshold_by_hand(values, rate, highest_normal):
  """It lies just above the highest value that must stay normal."""
  found = calibration.threshold_at(np.array(values), rate)
  assert found == just_above(highest_normal) > highest_normal


def test_threshold_equals_brute_force():
  rng = np.random.default_rng(0)
  for size in (1, 2, 3, 7, 20):
    for rate in (0.0, 0.011, 0.1, 0.26, 0.51, 0.99):
      # Few distinct values, so most are tied; then none.
      for values in (rng.integers(0, 5, size) / 4.0, rng.normal(size=size)):
        values = values.astype(np.float32)
        found = calibration.threshold_at(values, rate)
        assert found == brute_force_threshold(values, rate), (values, rate)
        assert np.mean(values >= found) <= rate


def test_threshold_of_maps_ignores_their_shape_and_order():
  maps = np.random.default_rng(1).normal(size=(3, 8, 8)).astype(np.float32)
  before = maps.copy()
  found = calibration.threshold_at(maps, 0.05)
  assert type(found) is float
  assert found == calibration.threshold_at(np.sort(maps.ravel()), 0.05)
  assert np.count_nonzero(maps >= found) == math.floor(0.05 * maps.size)
  np.testing.assert_array_equal(maps, before)


@pytest.mark.parametrize('rate', [-0.1, 1.0, 2.0, math.nan])
def test_threshold_refuses_what_is_no_rate(rate):
  with pytest.raises(ValueError, match=r'image_fpr.*pixel_fpr.*\[0, 1\)'):
    calibration.threshold_at(np.zeros(3), rate)


# --- fusion ------------------------------------------------------------------


def held_out(count=3, size=8, seed=0):
  rng = np.random.default_rng(seed)
  probabilities = rng.beta(1.0, 3.0, size=(count, size, size))
  maps_mean = rng.gamma(2.0, 0.05, size=probabilities.shape)
  return probabilities.astype(np.float32), maps_mean.astype(np.float32)


def test_fusion_puts_normal_pixels_at_zero_and_their_999_permille_at_one():
  probabilities, maps_mean = held_out()
  config = model_helpers.tiny_config(head__maps_weight=0.5)
  fusion = calibration.fit_fusion(config, probabilities, maps_mean)

  def standardised(values):
    center = np.median(values.astype(np.float64))
    return (values - center) / (np.quantile(values, 0.999) - center)

  expected = standardised(probabilities) + 0.5 * standardised(maps_mean)
  np.testing.assert_allclose(
    fusion(probabilities, maps_mean), expected, rtol=1e-4, atol=1e-5
  )


def test_fusion_without_a_head_is_the_standardised_maps():
  probabilities, maps_mean = held_out()
  config = model_helpers.tiny_config(head__kind='none', head__maps_weight=0.3)
  fusion = calibration.fit_fusion(config, maps_mean, maps_mean)
  found = fusion(maps_mean, maps_mean)
  np.testing.assert_allclose(np.median(found), 0.0, atol=1e-6)
  np.testing.assert_allclose(np.quantile(found, 0.999), 1.0, rtol=1e-5)
  # Whatever the probability is.
  np.testing.assert_array_equal(fusion(probabilities, maps_mean), found)


def test_a_silent_head_adds_at_most_five_units():
  probabilities, maps_mean = held_out()
  config = model_helpers.tiny_config(head__maps_weight=1.0)
  fusion = calibration.fit_fusion(config, 1e-6 * probabilities, maps_mean)
  sure, silent = fusion(np.float32(1.0), 0.5), fusion(np.float32(0.0), 0.5)
  assert sure - silent == pytest.approx(5.0, rel=1e-4)


def test_an_untrained_head_is_left_out():
  probabilities, maps_mean = held_out()
  config = model_helpers.tiny_config()
  fusion = calibration.fit_fusion(
    config, probabilities, maps_mean, head_is_trained=False
  )
  np.testing.assert_array_equal(
    fusion(probabilities, maps_mean), fusion(0.0 * probabilities, maps_mean)
  )


def test_fusion_of_constant_maps_is_finite():
  flat = np.full((1, 4, 4), 0.25, np.float32)
  fusion = calibration.fit_fusion(model_helpers.tiny_config(), flat, flat)
  assert np.all(np.isfinite(fusion(flat, flat)))
  assert fusion.head_scale > 0 and fusion.maps_scale > 0


# --- the whole calibration ---------------------------------------------------


def test_fit_by_hand():
  config = model_helpers.tiny_config(
    calibration__image_fpr=0.2, calibration__pixel_fpr=0.125
  )
  maps = np.arange(5 * 4 * 4, dtype=np.float32).reshape(5, 4, 4)
  scores = np.array([0.1, 0.9, 0.3, 0.5, 0.2], np.float32)
  fusion = score_lib.Fusion(head_center=1.0)
  found = calibration.fit(config, fusion, maps, scores)
  assert found.fusion == fusion
  assert found.images == 5
  # One of five images, and ten of 80 pixels, may lie above.
  assert found.image_threshold == just_above(0.5)
  assert found.pixel_threshold == just_above(69.0)
  np.testing.assert_allclose(found.image_scale, 0.9 - 0.3, rtol=1e-6)


def test_few_scores_are_extrapolated_by_students_t():
  scores = np.array([1.0, 2.0, 3.0, 2.0, 2.0], np.float32)
  # The one-sided 99 % point of t with 4 degrees of freedom, from a table.
  expected = 2.0 + 3.747 * math.sqrt(0.5) * math.sqrt(1.2)
  found = calibration.image_threshold_at(scores, 0.01)
  assert found == pytest.approx(expected, rel=1e-4)
  assert found == np.float32(found)


@pytest.mark.parametrize(
  'scores, rate',
  [
    (np.arange(99.0), 0.01),  # Enough to be counted.
    (np.arange(3.0), 0.01),
    (np.arange(50.0), 0.0),
    (np.array([0.0] * 30 + [9.0]), 0.03),  # Above what t says.
    (np.full(5, 2.0), 0.01),
  ],
)
def test_image_threshold_by_counting(scores, rate):
  found = calibration.image_threshold_at(scores, rate)
  assert found == calibration.threshold_at(scores, rate)


def test_few_scores_keep_the_rate_of_false_alarms():
  rng = np.random.default_rng(0)
  alarms = []
  for _ in range(2000):
    scores = rng.normal(5.0, 2.0, 6)
    threshold = calibration.image_threshold_at(scores[:5], 0.05)
    alarms.append(scores[5] >= threshold)
  # Just above the highest of five it would be one in six.
  assert 0.035 < np.mean(alarms) < 0.065


@pytest.mark.parametrize('held_out', [5, 20, 50])
@pytest.mark.parametrize('kind', ['normal', 'exponential'])
def test_training_images_keep_the_rate_of_false_alarms(kind, held_out):
  rng = np.random.default_rng(held_out)
  rates = []
  for _ in range(300):
    scores = getattr(rng, kind)(size=held_out + 200)
    # Those that were trained on score lower, and less apart.
    training = 0.8 * scores[held_out:] - 0.5
    threshold = calibration.pooled_threshold_at(
      scores[:held_out], training, 0.01
    )
    tail = stats.norm if kind == 'normal' else stats.expon
    rates.append(tail.sf(threshold))
  # One per cent, by what few scores tell of their spread.
  assert 0.002 < np.mean(rates) < 0.02


def test_a_rare_high_score_is_seen_among_training_images_alone():
  rng = np.random.default_rng(0)
  training = rng.normal(size=200)
  training[:4] = 9.0  # One image in fifty has a stain that is no defect.
  held_out = rng.normal(size=20)
  alone = calibration.image_threshold_at(held_out, 0.01)
  assert alone < 6.0
  assert calibration.pooled_threshold_at(held_out, training, 0.01) > 8.0


def test_scores_of_training_images_only_raise_a_threshold():
  rng = np.random.default_rng(1)
  held_out = rng.normal(size=20)
  alone = calibration.image_threshold_at(held_out, 0.01)
  lower = calibration.pooled_threshold_at(
    held_out, 0.01 * rng.normal(size=200) - 50.0, 0.01
  )
  assert lower >= alone
  for few, rate in ((held_out[:3], 0.01), (held_out, 0.0)):
    assert calibration.pooled_threshold_at(few, held_out, rate) == (
      calibration.image_threshold_at(few, rate)
    )


def test_aligned_scores_have_the_height_and_spread_of_the_held_out():
  rng = np.random.default_rng(2)
  training = rng.normal(size=1000)
  held_out = 7.0 + 3.0 * rng.normal(size=1000)
  found = calibration.align(training, held_out)
  assert np.mean(found) == pytest.approx(np.mean(held_out))
  assert np.std(found) == pytest.approx(3.0, rel=0.1)
  # Held-out images that score lower are chance: nothing is lowered.
  found = calibration.align(training, 0.1 * held_out - 50.0)
  np.testing.assert_allclose(found, training, atol=1e-12)


@pytest.mark.parametrize('shape', [0.0, 0.2, 0.4])
def test_tail_quantile_of_a_known_tail(shape):
  scores = stats.genpareto.rvs(shape, size=200_000, random_state=0)
  expected = stats.genpareto.isf(0.001, shape)
  found = calibration.tail_quantile(scores, 0.001)
  assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize('scores', [np.arange(19.0), np.arange(50.0)])
def test_tail_quantile_where_there_is_no_tail(scores):
  assert calibration.tail_quantile(scores, 0.5) == -math.inf
  assert calibration.tail_quantile(np.ones(50), 0.01) == 1.0


def test_doubts_name_a_rate_and_scores_that_do_not_fit():
  rng = np.random.default_rng(3)
  config = model_helpers.tiny_config(calibration__image_fpr=0.01)
  fitted = calibration.fit(
    config, score_lib.Fusion(), np.zeros((1, 4, 4)), rng.normal(size=30)
  )
  assert not calibration.doubts(fitted, rng.normal(size=60), 0.01)
  found = calibration.doubts(fitted, 3.0 + rng.normal(size=60), 0.01)
  assert len(found) == 2
  assert 'good images are called defective' in found[0]
  assert 'held-out' in found[1]
  unknown = calibration.uncalibrated(config)
  assert not calibration.doubts(unknown, np.ones(60), 0.01)


def test_an_older_document_has_no_scores():
  config = model_helpers.tiny_config()
  fitted = calibration.fit(
    config, score_lib.Fusion(), np.zeros((1, 4, 4)), np.arange(5.0)
  )
  document = fitted.to_dict()
  assert document.pop('scores') == [0.0, 1.0, 2.0, 3.0, 4.0]
  older = calibration.from_dict(document)
  assert older.scores == () and older.images == 5
  assert older.image_threshold == fitted.image_threshold


def test_one_image_is_enough_to_fit():
  config = model_helpers.tiny_config()
  maps = np.arange(16.0).reshape(1, 4, 4)
  found = calibration.fit(config, score_lib.Fusion(), maps, np.array([2.0]))
  assert found.image_threshold == just_above(2.0)
  assert found.pixel_threshold == just_above(15.0)
  assert found.image_scale > 0.0 and found.images == 1


def test_a_document_survives_json():
  config = model_helpers.tiny_config()
  probabilities, maps_mean = held_out()
  fusion = calibration.fit_fusion(config, probabilities, maps_mean)
  fitted = calibration.fit(
    config, fusion, fusion(probabilities, maps_mean), np.array([1.0, 2.0, 4.0])
  )
  document = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
  assert calibration.from_dict(document) == fitted
  # What is stored does the same to a map.
  np.testing.assert_array_equal(
    calibration.from_dict(document).fusion(probabilities, maps_mean),
    fusion(probabilities, maps_mean),
  )


def test_array_scalars_become_plain_numbers():
  fusion = score_lib.Fusion(
    head_center=np.float32(0.5), head_scale=np.float64(2)
  )
  found = calibration.Calibration(
    fusion, np.float32(1.5), np.float32(2.5), np.float32(1), np.int64(3)
  )
  document = json.loads(json.dumps(found.to_dict()))
  assert document['fusion']['head_center'] == 0.5
  assert document['pixel_threshold'] == 2.5 and document['images'] == 3


@pytest.mark.parametrize(
  'changes, expected, scored',
  [
    ({'head__maps_weight': 0.25}, 3.0 + 0.25 * 0.5, 0.25 * (3.0 + 0.5)),
    ({'head__maps_weight': 0.0}, 3.0, 0.25 * 3.0),
    ({'head__score_weight': 0.0, 'head__maps_weight': 1.0}, 3.5, 0.5),
    ({'head__kind': 'none'}, 0.5, 0.5),
  ],
)
def test_uncalibrated_fuses_raw_units_and_has_no_thresholds(
  changes, expected, scored
):
  found = calibration.uncalibrated(model_helpers.tiny_config(**changes))
  assert found.images == 0 and found.image_scale > 0.0
  assert math.isnan(found.image_threshold)
  assert math.isnan(found.pixel_threshold)
  assert found.fusion(np.array(3.0), np.array(0.5)) == expected
  assert found.fusion.score_map(np.array(3.0), np.array(0.5)) == scored
  # No score is called defective by a threshold that is not there.
  assert not np.any(np.array([-1e9, 1e9]) >= found.image_threshold)


def test_uncalibrated_survives_its_document():
  found = calibration.uncalibrated(model_helpers.tiny_config())
  again = calibration.from_dict(json.loads(json.dumps(found.to_dict())))
  assert again.fusion == found.fusion and again.images == 0
  assert math.isnan(again.image_threshold)
  assert math.isnan(again.pixel_threshold)


@pytest.mark.parametrize('scores', [[2.0], [2.0] * 4, [1.0, 2.0, 2.0]])
def test_scores_without_a_spread_are_warned_of(scores, warnings):
  config = model_helpers.tiny_config()
  fitted = calibration.fit(
    config, score_lib.Fusion(), np.zeros((1, 4, 4)), np.array(scores)
  )
  assert any('the highest score, 2:' in text for text in warnings)
  doubts = calibration.doubts(fitted, np.ones(1), 0.01)
  assert any('the highest score, 2:' in text for text in doubts)
  assert np.isnan(fitted.scaled(3.0))  # And not a million spreads.
  assert fitted.verdict(3.0) == 'defective'


def test_scores_with_a_spread_are_not(warnings):
  config = model_helpers.tiny_config()
  scores = np.array([1.0, 1.5, 2.0])
  maps = np.zeros((1, 4, 4))
  fitted = calibration.fit(config, score_lib.Fusion(), maps, scores)
  assert not warnings and np.isfinite(fitted.scaled(3.0))
