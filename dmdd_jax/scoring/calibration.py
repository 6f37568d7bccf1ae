"""What held-out normal images say: fusion, thresholds, score scale.

No test image and no training image is looked at. Counting n held-out images
shows no false-positive rate under 1 / (n + 1); the threshold for a lower one
takes their scores as normally distributed, and the log says so.

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

from dmdd_jax import verdict as verdict_lib
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
  """

  fusion: score_lib.Fusion
  image_threshold: float
  pixel_threshold: float
  image_scale: float
  images: int

  def verdict(self, score: float) -> str:
    """See `verdict.verdict`."""
    return verdict_lib.verdict(score, self.image_threshold)

  def scaled(self, score: float) -> float:
    """How far above the threshold a score is, in spreads of normal scores.

    0 at the threshold, below it negative; NaN where nothing is calibrated.
    Unlike scores, it compares from category to category.
    """
    return (score - self.image_threshold) / self.image_scale

  def to_dict(self) -> dict[str, Any]:
    """The JSON document stored with a checkpoint."""
    return {
      'fusion': {k: float(v) for k, v in vars(self.fusion).items()},
      'image_threshold': float(self.image_threshold),
      'pixel_threshold': float(self.pixel_threshold),
      'image_scale': float(self.image_scale),
      'images': int(self.images),
    }


def from_dict(document: Mapping[str, Any]) -> Calibration:
  """Reads what `Calibration.to_dict` wrote."""
  rest = {k: v for k, v in document.items() if k != 'fusion'}
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
) -> Calibration:
  """Thresholds from the fused maps (N, S, S) and scores (N,), N >= 1."""
  options = config.calibration
  spread = float(np.max(scores) - np.median(scores))
  return Calibration(
    fusion=fusion,
    image_threshold=image_threshold_at(scores, options.image_fpr),
    pixel_threshold=threshold_at(maps, options.pixel_fpr),
    image_scale=max(spread, 1e-6),
    images=len(scores),
  )


def threshold_at(values: np.ndarray, false_positive_rate: float) -> float:
  """The lowest float32 that at most so large a share of `values` reaches.

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
) -> Calibration:
  """Fits fusion, thresholds and scales on held-out normals (N, S, S, 3)."""
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
  return fit(
    config,
    fusion,
    np.asarray(prediction.map),
    np.asarray(prediction.image_score),
  )
