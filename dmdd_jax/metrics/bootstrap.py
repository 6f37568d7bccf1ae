"""Confidence intervals of all metrics by resampling the test images.

A draw takes as many good and as many defective images as the set has, with
replacement and separately, so that each draw has both. The pixels are not
sorted again: each image's counts at up to some thousands of thresholds are
taken once, a draw is a vector of integers over the images, and the counts of
all draws are one matrix product.

With fewer distinct scores than thresholds this is exact. Otherwise the scores
between two thresholds are merged as if they tied; the thresholds are quantiles
of the pixels' scores, dense where the metrics look, and what the merging does
to the metric of the full set, which is known exactly, is taken off each draw.
"""

from typing import NamedTuple

import numpy as np

from dmdd_jax.metrics import region

_THRESHOLDS = 4096
_CELLS = 2**24  # images times thresholds, at most
_DRAWS_AT_ONCE = 64
_SAMPLE = 2**17


class Tallies(NamedTuple):
  """Per-image counts at thresholds.

  Attributes:
    positives: (N, K) positives at or above each threshold, descending, the
      last of which is below every score.
    negatives: (N, K) likewise.
    overlap: (N, K) sum over the image's regions of the share found, or None.
    normal: (N,) bool, the images whose false positives AUPIMO uses, or None.
    sizes: (N,) pixels.
    regions: (N,) number of regions.
  """

  positives: np.ndarray
  negatives: np.ndarray
  overlap: np.ndarray | None = None
  normal: np.ndarray | None = None
  sizes: np.ndarray | None = None
  regions: np.ndarray | None = None


def draw(labels, draws, seed):
  """Resamples images within each label.

  Args:
    labels: (N,) in {0, 1}.
    draws: number of draws.
    seed: of numpy's default generator.

  Returns:
    (draws, N) int64, how often each image occurs in each draw.
  """
  rng = np.random.default_rng(seed)
  weights = np.zeros((draws, len(labels)), np.int64)
  for label in (0, 1):
    images = np.flatnonzero(labels == label)
    if len(images):
      share = np.full(len(images), 1 / len(images))
      weights[:, images] = rng.multinomial(len(images), share, size=draws)
  return weights


def intervals(measure, weights, exact, level=0.95):
  """Percentile intervals.

  Args:
    measure: function from (B, N) weights to {metric: (B,) values}.
    weights: (draws, N) from `draw`.
    exact: {metric: value} on the full set; NaN gives [NaN, NaN].
    level: confidence level.

  Returns:
    {metric: [low, high]} for the metrics that both know. Draws in which a
    metric is undefined are left out of its interval.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    whole = measure(np.ones((1, weights.shape[1])))
    batches = [
      measure(weights[k : k + _DRAWS_AT_ONCE].astype(np.float64))
      for k in range(0, len(weights), _DRAWS_AT_ONCE)
    ]
  tails = [50 * (1 - level), 50 * (1 + level)]
  found = {}
  for name in exact.keys() & whole.keys():
    values = np.concatenate([batch[name] for batch in batches])
    values = values[~np.isnan(values)]
    if np.isnan(exact[name]) or not len(values):
      found[name] = [float('nan')] * 2
      continue
    shift = exact[name] - whole[name][0]
    ends = np.clip(np.percentile(values, tails) + shift, 0, 1)
    found[name] = [float(end) for end in ends]
  return found


def tally_scores(scores, labels):
  """`Tallies` of image scores (N,) and labels (N,); exact to 4096 scores."""
  marks = np.unique(scores)
  if len(marks) > _THRESHOLDS:
    marks = _quantiles(marks, _THRESHOLDS)
  marks = marks[::-1]
  found = scores[:, None] >= marks
  positives = (found & (labels == 1)[:, None]).astype(np.float64)
  return Tallies(positives, found - positives)


def tally_pixels(pixels, normal, thresholds=_THRESHOLDS):
  """`Tallies` of the pixels of `region.Pixels`; normal as for AUPIMO."""
  thresholds = min(thresholds, max(256, _CELLS // len(pixels.sizes)))
  marks = _thresholds(pixels, normal, thresholds)
  shape = len(pixels.sizes), len(marks)
  positives, negatives, overlap = np.zeros((3, *shape))
  for index, areas in enumerate(pixels.areas):
    scores, regions = pixels.read(index)
    if not len(areas):
      negatives[index] = _at_least(np.sort(scores), marks)
      continue
    hit = np.flatnonzero(regions)
    negatives[index] = _at_least(np.sort(scores[regions == 0]), marks)
    hit = hit[np.argsort(scores[hit])]
    positives[index] = _at_least(scores[hit], marks)
    weight = (1.0 / areas)[regions[hit[::-1]] - 1]
    total = np.append(0.0, np.cumsum(weight))
    overlap[index] = total[positives[index].astype(int)]
  regions = np.array([len(areas) for areas in pixels.areas], float)
  sizes = np.array(pixels.sizes, float)
  return Tallies(positives, negatives, overlap, normal, sizes, regions)


def _at_least(ascending, marks):
  return len(ascending) - np.searchsorted(ascending, marks)


def _thresholds(pixels, normal, count):
  """Descending thresholds: all distinct scores if few, else quantiles."""
  rng = np.random.default_rng(0)
  total = sum(pixels.sizes)
  both = [], []
  for index in range(len(pixels.sizes)):
    scores, regions = pixels.read(index)
    sides = [scores, scores[:0]]
    if regions is not None:
      sides = [scores[regions == 0], scores[regions > 0]]
    all_of = (total - pixels.positives, pixels.positives)
    for side, kept, whole in zip(sides, both, all_of, strict=True):
      if whole > _SAMPLE and len(side):
        side = rng.choice(side, -(-_SAMPLE * len(side) // whole))
      kept.append(side)
  negatives, positives = (np.sort(np.concatenate(side)) for side in both)
  everything = np.unique(np.concatenate([negatives, positives]))
  if total <= _SAMPLE and len(everything) <= count:
    return everything[::-1]
  part = count // 4
  tail = negatives[int(0.95 * len(negatives)) :]
  marks = [_quantiles(side, part) for side in (negatives, tail, positives)]
  if not region.aupimo_undefined(pixels, normal):
    marks.append(_quantiles(region.shared_fpr(pixels, normal, 2e-4)[0], part))
  return np.append(np.unique(np.concatenate(marks))[::-1], -np.inf)


def _quantiles(values, count):
  if not len(values):
    return values
  return values[np.linspace(0, len(values) - 1, count).astype(int)]


def measure_ranking(tallies, weights):
  """AUROC, AP and F1-max of draws.

  Args:
    tallies: `Tallies` with positives and negatives.
    weights: (B, N) how often each image counts.

  Returns:
    {'auroc', 'ap', 'f1_max': (B,) float64}, NaN where a class is missing.
  """
  tp, fp = weights @ tallies.positives, weights @ tallies.negatives
  found = {
    'auroc': _area(_from_zero(fp), _from_zero(tp), fp[:, -1]) / tp[:, -1],
    'ap': np.sum(
      np.diff(tp, axis=1, prepend=0) * tp / np.maximum(tp + fp, 1), axis=1
    )
    / tp[:, -1],
    'f1_max': np.max(2 * tp / (tp + fp + tp[:, -1:]), axis=1),
  }
  lacking = (tp[:, -1] == 0) | (fp[:, -1] == 0)
  return {k: np.where(lacking, np.nan, v) for k, v in found.items()}


def measure_regions(tallies, weights, limits, bounds=(1e-5, 1e-4)):
  """AU-PRO at each limit, and AUPIMO, of draws.

  Args:
    tallies: `Tallies` of pixels.
    weights: (B, N) how often each image counts.
    limits: FPR limits.
    bounds: of AUPIMO.

  Returns:
    List of (B,) AU-PRO, and (B,) AUPIMO.
  """
  fp = weights @ tallies.negatives
  pro = weights @ tallies.overlap / (weights @ tallies.regions)[:, None]
  fp, pro = _from_zero(fp), _from_zero(pro)
  pros = [_area(fp, pro, limit * fp[:, -1]) for limit in limits]
  normal = weights * tallies.normal
  rate = normal @ (tallies.negatives / tallies.sizes[:, None])
  rate = _from_zero(rate / normal.sum(axis=1, keepdims=True))
  defects = tallies.positives[:, -1]
  overlap = weights @ (tallies.positives / np.maximum(defects, 1)[:, None])
  overlap = overlap / (weights @ (defects > 0))[:, None]
  overlap = _from_zero(overlap)
  pimo = region.log_area(
    rate[:, :-1], rate[:, 1:], overlap[:, :-1], overlap[:, 1:], bounds
  )
  return pros, pimo


def _from_zero(curve):
  return np.pad(curve, ((0, 0), (1, 0)))


def _area(x, y, limit):
  """(B,) mean of (B, K) y over ascending (B, K) x from 0 to (B,) limit."""
  limit = limit[:, None]
  width = np.diff(x, axis=1)
  used = np.clip(limit - x[:, :-1], 0, width)
  slope = np.diff(y, axis=1) / np.where(width > 0, width, 1)
  return np.sum(used * (y[:, :-1] + slope * used / 2), axis=1) / limit[:, 0]
