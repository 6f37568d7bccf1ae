"""95 % confidence intervals: of shares, of AUROC and of any other figure.

A test set has few images, and good methods score near 1: percentiles of a
bootstrap then lie too high and too close together. What is here was chosen by
how often it holds the true value (docs/experiments/intervals.md):

- a share of images: the exact interval of Clopper and Pearson;
- the AUROC of images: method 5 of Newcombe, which is defined at 1 too;
- AP of images: a score interval whose variance is partly known beforehand;
- anything else: Student's t on the logit scale around the jackknife's variance.

Synopsis:

  low, high = intervals.share(3, 41)
  low, high = intervals.auroc(0.97, positives=63, negatives=20)
  ends = intervals.jackknife(0.95, values_without_each_image, labels)
"""

import math

import numpy as np
from scipy import special

_Z = float(special.ndtri(0.975))
# Of each label, to see any spread at all.
_MIN_IMAGES = 5
# The fewest degrees of freedom that heavy tails lead to.
_MIN_FREEDOM = 3.0
# What the variance of AP is before an image is seen: half that of a share of
# the defective images, and this is worth as much as six of them.
_PRIOR_RATIO, _PRIOR_IMAGES = 0.5, 6.0
# Of other figures: this part of such a share's variance, worth one image.
_UNSEEN = 0.15


def share(count: int, total: int) -> tuple[float, float]:
  """The exact interval of a share (Clopper and Pearson 1934), total >= 1."""
  low = special.betaincinv(count, total - count + 1, 0.025) if count else 0.0
  high = 1.0
  if count < total:
    high = special.betaincinv(count + 1, total - count, 0.975)
  return float(low), float(high)


def auroc(value: float, positives: int, negatives: int) -> tuple[float, float]:
  """The interval of an AUROC of independent scores.

  It holds the values that the observed one is within 1.96 standard errors of,
  where the standard error is that of Hanley and McNeil at the value in question
  with both sizes replaced by their mean in its numerator. Source: method 5 of
  Newcombe, Statistics in Medicine 25 (2006) 559-573.

  Args:
    value: in [0, 1].
    positives: number of positives, >= 1.
    negatives: number of negatives, >= 1.
  """
  size = (positives + negatives) / 2 - 1

  def outside(theta: float) -> bool:
    spread = 1 + size * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    variance = theta * (1 - theta) * spread / (positives * negatives)
    return (theta - value) ** 2 > _Z**2 * variance

  ends = []
  for far in (0.0, 1.0):
    inside = value
    if value in (0.0, 1.0):
      inside = abs(value - 1e-9)  # At 0 and 1 themselves the variance is 0.
    for _ in range(60 if far != value else 0):
      middle = (inside + far) / 2
      if outside(middle):
        far = middle
      else:
        inside = middle
    ends.append(far)
  return ends[0], ends[1]


def average_precision(
  value: float, left_out: np.ndarray, labels: np.ndarray
) -> tuple[float, float] | str:
  """The interval of the average precision of images.

  It holds the values that the observed one is within t standard errors of,
  their variance being that of a share of the defective images, times a ratio:
  what the jackknife gives, drawn towards one half as by six images. So there is
  an interval at 1 too, where the jackknife sees no variance.

  Args:
    value: in [0, 1].
    left_out: (G,) the values without each image.
    labels: (G,) in {0, 1}, the label of the image left out.

  Returns:
    The ends, or the reason why there are none.
  """
  if reason := too_few(labels):
    return reason
  deviations = _deviations(left_out, labels)
  count = int(np.count_nonzero(labels))
  ratio = _PRIOR_RATIO
  if 0.0 < value < 1.0:
    observed = count * np.sum(deviations**2) / (value * (1 - value))
    weights = (_PRIOR_IMAGES, count)
    ratio = float(np.average([_PRIOR_RATIO, observed], weights=weights))
  freedom = min(count, len(labels) - count) - 1
  # Wilson's interval of a share, with t for z and the size that has the ratio.
  scaled = special.stdtrit(freedom, 0.975) ** 2 * ratio / count
  center = (value + scaled / 2) / (1 + scaled)
  inner = scaled * value * (1 - value) + scaled**2 / 4
  half = math.sqrt(inner) / (1 + scaled)
  return float(max(0.0, center - half)), float(min(1.0, center + half))


def jackknife(
  value: float, left_out: np.ndarray, labels: np.ndarray
) -> tuple[float, float] | str:
  """The interval of a figure in (0, 1) from its values without each image.

  The variance is the jackknife's, each label by itself, carried to the logit
  scale. It is at least what one more defective image would make of it, with
  0.15 of the variance of a share: the hardest images are often not in the set.
  The degrees of freedom of Student's t are those of the smaller label, or fewer
  where few images make most of the variance.

  Args:
    value: the figure of the whole set.
    left_out: (G,) its values without each image (or group of images).
    labels: (G,) in {0, 1}, the label of the image left out. A label may be
      missing.

  Returns:
    The ends, or the reason why there are none.
  """
  if reason := too_few(labels):
    return reason
  squares = _deviations(left_out, labels) ** 2
  variance = float(np.sum(squares))
  if math.isnan(variance):
    return 'without one of the images it is undefined'
  if not 0.0 < value < 1.0 or not variance:
    return f'it is {value:g}, and these images show nothing of how it varies'
  counts = [int(np.count_nonzero(labels == label)) for label in (0, 1)]
  each = [
    np.sum(squares[labels == label]) ** 2 / count
    for label, count in enumerate(counts)
    if count
  ]
  # A variance of n squares, of which few are large, is as uncertain as one of
  # fewer equal ones: 2 v^2 over the variance of their sum, as it is seen. Half
  # of that, for a small set shows too little of how heavy the tails are.
  uncertain = np.sum(squares**2) - sum(each)
  heavy = variance**2 / uncertain if uncertain > 0 else math.inf
  smaller = min(count for count in counts if count) - 1
  freedom = min(smaller, max(heavy, _MIN_FREEDOM))
  center = special.logit(value)
  count = counts[1] or counts[0]
  unseen = _UNSEEN * value * (1 - value) / count
  variance = max(variance, (count * variance + unseen) / (count + 1))
  width = special.stdtrit(freedom, 0.975) * math.sqrt(variance)
  width /= value * (1 - value)
  return float(special.expit(center - width)), float(
    special.expit(center + width)
  )


def too_few(labels: np.ndarray) -> str | None:
  """The reason why images (N,) in {0, 1} are too few, or None."""
  for label, name in enumerate(('good', 'defective')):
    count = int(np.count_nonzero(labels == label))
    if 0 < count < _MIN_IMAGES:
      return (
        f'{count} {name} images, and an interval needs {_MIN_IMAGES} or more'
      )
  return None


def _deviations(left_out: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """(G,) whose squares add up to the jackknife's variance."""
  deviations = np.zeros(len(labels))
  for label in (0, 1):
    of_label = labels == label
    if count := np.count_nonzero(of_label):
      values = left_out[of_label]
      scale = math.sqrt((count - 1) / count)
      deviations[of_label] = scale * (values - values.mean())
  return deviations
