"""What held-out normal images say: fusion, thresholds, score scale.

No test image is looked at. Counting n held-out images shows no false-positive
rate under 1 / (n + 1), and a few good images score far above the rest. What
such a tail looks like is learned from the many training images, whose scores
are first brought to the height and spread of those held out.

Synopsis:

  fusion = calibration.fit_fusion(config, probabilities, distances)
  found = calibration.fit(config, fusion, maps, scores)
  is_defective = score >= found.image_threshold
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from absl import logging
import ml_collections
import numpy as np
from scipy import special
from scipy import stats

from dmdd_jax import verdict as verdict_lib
from dmdd_jax.metrics import intervals
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import steps
from dmdd_jax.training import train_state

# Normal pixels' spread is measured from their median to this quantile: the
# heavy upper tail is what decides false alarms, a deviation would not see it.
_SCALE_QUANTILE = 0.999
# A head that is silent on all normal pixels would otherwise outweigh the
# distances without bound: at its surest it adds at most 1 / 0.2 = 5 units.
_MIN_HEAD_SCALE = 0.2
# Of fewer scores a deviation says nothing.
_MIN_FOR_INTERVAL = 4
# A tail is fitted to this share of the scores, to at least 10 of them, and only
# where there are 20 scores or more.
_TAIL_SHARE, _TAIL_MIN = 0.1, 10
# The shape of a tail: 0 is exponential, from 0.5 on its variance is infinite.
_TAIL_SHAPES = (0.0, 0.5)
# The held-out scores' spread is wider than the training images' only if this
# one-sided bound of it is: of few scores a deviation is mostly chance.
_SPREAD_CONFIDENCE = 0.8
# The `image_scale` of scores without a spread, which divides nothing.
_NO_SPREAD = 1e-6
# Scores that differ by less are equal but for rounding.
_EQUAL = 1e-5
# Scores as unlike as held-out and test scores would rarely be by chance.
_ALIKE = 0.01


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Thresholds and scales from held-out normal images.

  Attributes:
    fusion: of probability and distance.
    image_threshold: an image with this score or more is called defective.
    pixel_threshold: a pixel with this value or more is called defective.
    image_scale: spread of normal image scores (median to highest), > 0.
    images: how many images were held out; 0 means nothing is calibrated, the
      thresholds are NaN.
    scores: theirs; () in checkpoints of before this field.
  """

  fusion: score_lib.Fusion
  image_threshold: float
  pixel_threshold: float
  image_scale: float
  images: int
  scores: tuple[float, ...] = ()

  def verdict(self, score: float) -> str:
    """See `verdict.verdict`."""
    return verdict_lib.verdict(score, self.image_threshold)

  def scaled(self, score: float) -> float:
    """How far above the threshold a score is, in spreads of normal scores.

    0 at the threshold, below it negative; NaN where nothing is calibrated, and
    where normal scores have no spread. Unlike scores, it compares from category
    to category.
    """
    if self.image_scale <= _NO_SPREAD:
      return math.nan
    return (score - self.image_threshold) / self.image_scale

  def to_dict(self) -> dict[str, Any]:
    """The JSON document stored with a checkpoint."""
    return {
      'fusion': {k: float(v) for k, v in vars(self.fusion).items()},
      'image_threshold': float(self.image_threshold),
      'pixel_threshold': float(self.pixel_threshold),
      'image_scale': float(self.image_scale),
      'images': int(self.images),
      'scores': [float(score) for score in self.scores],
    }


def from_dict(document: Mapping[str, Any]) -> Calibration:
  """Reads what `Calibration.to_dict` wrote."""
  rest = {k: v for k, v in document.items() if k != 'fusion'}
  rest['scores'] = tuple(rest.get('scores', ()))
  return Calibration(fusion=score_lib.Fusion(**document['fusion']), **rest)


def fit_fusion(
  config: ml_collections.ConfigDict,
  probabilities: np.ndarray,
  distances: np.ndarray,
  head_is_trained: bool = True,
) -> score_lib.Fusion:
  """Standardises probability and distance by held-out normal pixels.

  Args:
    config: `head.kind`, `.maps_weight` and `.score_weight` are read.
    probabilities: (N, S, S) of held-out normal images, N >= 1.
    distances: likewise.
    head_is_trained: False leaves the head out: before its first step, and
      where it never gets one, it says nothing.
  """
  head_center, head_scale = _center_and_scale(probabilities)
  head_scale = max(head_scale, _MIN_HEAD_SCALE)
  maps_center, maps_scale = _center_and_scale(distances)
  return score_lib.Fusion(
    head_center=head_center,
    head_scale=head_scale,
    maps_center=maps_center,
    maps_scale=maps_scale,
    **_weights(config, head_is_trained),
  )


def uncalibrated(
  config: ml_collections.ConfigDict, head_is_trained: bool = True
) -> Calibration:
  """Without held-out images: raw units, and thresholds that are NaN."""
  logging.warning('no image is held out: there are no thresholds')
  fusion = score_lib.Fusion(**_weights(config, head_is_trained))
  return Calibration(fusion, math.nan, math.nan, 1.0, 0)


def fit(
  config: ml_collections.ConfigDict,
  fusion: score_lib.Fusion,
  maps: np.ndarray,
  scores: np.ndarray,
  training: np.ndarray | None = None,
) -> Calibration:
  """Thresholds from the fused maps (N, S, S) and scores (N,), N >= 1.

  With the scores (M,) of training images, see `pooled_threshold_at`.
  """
  options = config.calibration
  if training is None or not len(training):
    image_threshold = image_threshold_at(scores, options.image_fpr)
  else:
    image_threshold = pooled_threshold_at(scores, training, options.image_fpr)
  spread = float(np.max(scores) - np.median(scores))
  if warning := _equal_scores(scores):
    logging.warning('%s', warning)
  return Calibration(
    fusion=fusion,
    image_threshold=image_threshold,
    pixel_threshold=threshold_at(maps, options.pixel_fpr),
    image_scale=max(spread, _NO_SPREAD),
    images=len(scores),
    scores=tuple(float(score) for score in scores),
  )


def threshold_at(values: np.ndarray, false_positive_rate: float) -> float:
  """The lowest float32 that at most this share of `values` reaches.

  Args:
    values: float32, of normal images or pixels, any shape, not empty.
    false_positive_rate: in [0, 1).
  """
  if not 0.0 <= false_positive_rate < 1.0:
    raise ValueError(
      'config.calibration.image_fpr and .pixel_fpr must be in [0, 1), one is'
      f' {false_positive_rate}'
    )
  flat = np.ravel(np.asarray(values, np.float32))
  allowed = math.floor(false_positive_rate * len(flat) + 1e-9)
  highest_normal = np.partition(flat, len(flat) - 1 - allowed)[-1 - allowed]
  return float(np.nextafter(highest_normal, np.float32(np.inf)))


def image_threshold_at(scores: np.ndarray, false_positive_rate: float) -> float:
  """The score from which on an image is called defective.

  Of n scores that are too few for the rate to be counted, n + 1 times the rate
  being below 1, it is the upper end of the one-sided prediction interval of a
  further score, by Student's t distribution; never below their highest. Of
  fewer than 4 scores, or at the rate 0, it lies just above their highest.

  Args:
    scores: (n,), of held-out normal images, n >= 1.
    false_positive_rate: in [0, 1).
  """
  count = len(scores)
  counted = threshold_at(scores, false_positive_rate)
  if (count + 1) * false_positive_rate >= 1.0:
    return counted
  extrapolated = count >= _MIN_FOR_INTERVAL and false_positive_rate > 0.0
  logging.info(
    '%d held-out images cannot show a false-positive rate of %g by counting:'
    ' the image threshold %s',
    count,
    false_positive_rate,
    'takes their scores as normally distributed'
    if extrapolated
    else 'lies just above their highest score',
  )
  if not extrapolated:
    return counted
  scores = np.asarray(scores, np.float64)
  deviations = special.stdtrit(count - 1, 1.0 - false_positive_rate)
  width = np.std(scores, ddof=1) * math.sqrt(1.0 + 1.0 / count)
  return max(counted, float(np.float32(scores.mean() + deviations * width)))


def pooled_threshold_at(
  held_out: np.ndarray, training: np.ndarray, false_positive_rate: float
) -> float:
  """The image threshold from held-out scores and those of training images.

  The highest of three: that of the held-out scores alone; the one by counting
  all scores, those of training images moved up and spread out to the held-out
  ones (`align`); and the quantile of a generalised Pareto distribution fitted
  to the highest tenth of all. At the rate 0 it is the first.

  Args:
    held_out: (n,), n >= 1.
    training: (m,), of images that were trained on, m >= 1.
    false_positive_rate: in [0, 1).
  """
  threshold = image_threshold_at(held_out, false_positive_rate)
  if false_positive_rate == 0.0 or len(held_out) < _MIN_FOR_INTERVAL:
    return threshold
  scores = np.concatenate([held_out, align(training, held_out)])
  # One more of n + 1 scores, not of n.
  rate = max(0.0, false_positive_rate * (len(scores) + 1) - 1e-9)
  counted = threshold_at(scores, min(int(rate) / len(scores), 0.999))
  tail = tail_quantile(scores, false_positive_rate)
  return max(threshold, counted, float(np.float32(tail)))


def align(training: np.ndarray, held_out: np.ndarray) -> np.ndarray:
  """Scores (m,) of training images as if they had not been trained on.

  They are moved up to the mean of the held-out scores (n,) and spread out to
  their deviation, as far as n scores show that it is larger; never the reverse.
  """
  training = np.asarray(training, np.float64)
  held_out = np.asarray(held_out, np.float64)
  center, spread = training.mean(), training.std(ddof=min(1, len(training) - 1))
  factor, freedom = 1.0, len(held_out) - 1
  if spread > 0.0 and len(held_out) >= _MIN_FOR_INTERVAL:
    bound = special.chdtri(freedom, 1.0 - _SPREAD_CONFIDENCE)
    least = held_out.std(ddof=1) * math.sqrt(freedom / bound)
    factor = max(1.0, least / spread)
  higher = max(center, held_out.mean())
  return higher + factor * (training - center)


def tail_quantile(scores: np.ndarray, rate: float) -> float:
  """The value above which a share `rate` of further scores lies.

  A generalised Pareto distribution is fitted to what the highest tenth of the
  scores (n,) is above the rest, by probability-weighted moments (Hosking and
  Wallis 1987), its shape kept between 0 and 0.5. -inf where it does not apply:
  fewer than 20 scores, or a rate that is no part of the tail.
  """
  scores = np.sort(np.asarray(scores, np.float64))
  count = max(_TAIL_MIN, int(_TAIL_SHARE * len(scores)))
  share = count / max(len(scores), 1)
  if len(scores) < 2 * _TAIL_MIN or not 0.0 < rate < share:
    return -math.inf
  start = scores[-count - 1]
  excess = scores[-count:] - start
  mean = excess.mean()
  weighted = np.mean(excess * np.arange(count - 1, -1, -1)) / (count - 1)
  if mean <= 0.0:
    return float(start)
  # mean = s / (1 - xi) and weighted = s / (2 (2 - xi)), of which xi:
  ratio = mean - 2.0 * weighted
  shape = 2.0 - mean / ratio if ratio > 0.0 else _TAIL_SHAPES[1]
  shape = float(np.clip(shape, *_TAIL_SHAPES))
  scale = mean * (1.0 - shape)
  if shape < 1e-6:
    return float(start - scale * math.log(rate / share))
  return float(start + scale / shape * ((rate / share) ** -shape - 1.0))


def doubts(
  calibration: Calibration, good: np.ndarray, asked: float
) -> list[str]:
  """What speaks against a threshold on the scores (N,) of good test images.

  Args:
    calibration: without a threshold, there is nothing to say.
    good: N >= 1.
    asked: the rate of false alarms that was asked for.

  Returns:
    A sentence for each; each is logged too.
  """
  if math.isnan(calibration.image_threshold):
    return []
  warnings = []
  alarms = int(np.count_nonzero(good >= calibration.image_threshold))
  low, high = intervals.share(alarms, len(good))
  if not low <= asked <= high:
    warnings.append(
      f'{alarms} of {len(good)} good images are called defective, with 95 %'
      f' confidence {low:.1%} to {high:.1%} of all, where {asked:.1%} was asked'
    )
  held_out = np.asarray(calibration.scores, np.float64)
  if warning := _equal_scores(held_out):
    warnings.append(warning)
  if len(held_out) >= _MIN_FOR_INTERVAL and len(good) >= _MIN_FOR_INTERVAL:
    chance = stats.ks_2samp(held_out, good).pvalue
    if chance < _ALIKE:
      warnings.append(
        f'the scores of {len(held_out)} held-out and {len(good)} good test'
        ' images differ (medians'
        f' {np.median(held_out):.3g} and {np.median(good):.3g}; Kolmogorov and'
        f' Smirnov: p = {chance:.2g}): hold out images like those to come'
      )
  for warning in warnings:
    logging.warning('%s', warning)
  return warnings


def _equal_scores(scores: np.ndarray) -> str | None:
  """What to say of held-out scores (N,) that have no spread above them."""
  if not len(scores):
    return None
  highest, middle = float(np.max(scores)), float(np.median(scores))
  if highest - middle > _EQUAL * max(1.0, abs(highest)):
    return None
  which = 'the only held-out image has'
  if len(scores) > 1:
    which = f'at least half of the {len(scores)} held-out images have'
  return (
    f'{which} the highest score, {highest:.6g}: the threshold is right above'
    ' it, good images of the test may be called defective, and `scaled` means'
    ' nothing. Train on more and different good images'
  )


def _weights(
  config: ml_collections.ConfigDict, head_is_trained: bool
) -> dict[str, float]:
  if config.head.kind == 'none' or not head_is_trained:
    return {'head_weight': 0.0, 'maps_weight': 1.0, 'score_head_weight': 0.0}
  return {
    'head_weight': 1.0,
    'maps_weight': config.head.maps_weight,
    'score_head_weight': config.head.score_weight,
  }


def _center_and_scale(values: np.ndarray) -> tuple[float, float]:
  """Median, and distance from it to the upper quantile (at least 1e-6)."""
  center, upper = np.quantile(values, (0.5, _SCALE_QUANTILE))
  return float(center), max(float(upper - center), 1e-6)


def calibrate(
  predictor: predictor_lib.Predictor,
  state: train_state.TrainState,
  images: np.ndarray,
  training: np.ndarray | None = None,
) -> Calibration:
  """Fits fusion, thresholds and scales on held-out normals (N, S, S, 3).

  Args:
    predictor: of the state.
    state: the trained state.
    images: uint8, whole.
    training: uint8 (M, S, S, 3), images that were trained on, for the image
      threshold. At most `config.calibration.training_images` of them are
      scored; none where images are cut into tiles.
  """
  config = predictor.config
  trained = steps.head_is_trained(config, int(state.step))
  if not len(images):
    return uncalibrated(config, trained)
  raw = predictor_lib.predict_images(
    predictor, state, score_lib.Fusion(), images
  )
  fusion = fit_fusion(
    config, np.asarray(raw.probability), np.asarray(raw.distance), trained
  )
  prediction = predictor_lib.predict_images(predictor, state, fusion, images)
  scores = None
  count = config.calibration.training_images
  if count and training is not None and not config.data.tile_size:
    rng = np.random.default_rng(config.seed % 2**64)
    chosen = np.sort(rng.permutation(len(training))[:count])
    known = predictor_lib.predict_images(
      predictor, state, fusion, training[chosen]
    )
    scores = np.asarray(known.image_score)
  return fit(
    config,
    fusion,
    np.asarray(prediction.map),
    np.asarray(prediction.image_score),
    scores,
  )
