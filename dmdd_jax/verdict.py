"""What an image's score means; the one rule for checkpoints and exports.

Synopsis:

  verdict.verdict(score=1.2, threshold=0.9)  # 'defective'
"""

import math

DEFECTIVE, GOOD, UNCALIBRATED = 'defective', 'good', 'uncalibrated'
# Scores are spreads of normal pixels above their median: of the order of 1,
# and of a million where the pixels hardly differ.
HIGHEST_THRESHOLD = 1e9


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


def check_threshold(name: str, value: object) -> None:
  """Raises ValueError where a value is no threshold; NaN is one: none is set.

  The loader beside an exported file (export/onnx_loader.py) has the same rule.
  """
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'{name} is {value!r}, not a number')
  if abs(value) > HIGHEST_THRESHOLD:
    raise ValueError(
      f'{name} is {value}: no score comes near it; at most'
      f' {HIGHEST_THRESHOLD:g} is expected'
    )
