"""What an image's score means; the one rule for checkpoints and exports.

Synopsis:

  verdict.verdict(score=1.2, threshold=0.9)  # 'defective'
"""

import math

DEFECTIVE, GOOD, UNCALIBRATED = 'defective', 'good', 'uncalibrated'


def verdict(score: float, threshold: float | None) -> str:
  """The verdict on an image.

  Args:
    score: of the image, higher is more anomalous.
    threshold: an image at or above it is defective; None or NaN where no image
      was held out to set one.

  Returns:
    `DEFECTIVE`, `GOOD`, or `UNCALIBRATED` without a threshold.

  Raises:
    ValueError: the score is not finite.
  """
  if threshold is None or math.isnan(threshold):
    return UNCALIBRATED
  if not math.isfinite(score):
    raise ValueError(
      f'an image has the score {score}, on which there is no verdict: the'
      ' weights are damaged, or config.dtype is too narrow for them'
    )
  return DEFECTIVE if score >= threshold else GOOD


def threshold_or_none(threshold: float) -> float | None:
  """A threshold for JSON, which has no NaN: None where none was set."""
  return float(threshold) if math.isfinite(threshold) else None
