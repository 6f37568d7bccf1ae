"""Confidence intervals of all metrics by resampling the test images.

A draw has as many good and as many defective images as the set. Both are drawn
separately, with replacement. The pixels are not sorted again for each draw:
each image's counts at up to 4096 thresholds are computed once, a draw is a
vector of integers over the images, and the counts of all draws are one matrix
product.

With fewer distinct scores than thresholds this is exact. Otherwise the scores
between two thresholds are merged as if they tied. The thresholds are quantiles
of the pixels' scores, dense where the metrics look. The exact metric of the
full set is known, so the error that merging causes there is subtracted from
each draw.

Synopsis:

  weights = bootstrap.draw(labels, draws=1000, seed=0)
  tallies = bootstrap.tally_scores(scores, labels)
  measure = functools.partial(bootstrap.measure_ranking, tallies)
  ends = bootstrap.intervals(measure, weights, exact)
"""

from collections.abc import Callable, Mapping, Sequence
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
    positives: (N, K) float64, positives at or above each of K thresholds. The
      thresholds descend, and the last one is below every score.
    negatives: (N, K) float64, likewise.
  """

  positives: np.ndarray
  negatives: np.ndarray


class PixelTallies(NamedTuple):
  """Per-image counts of pixels at thresholds, for the metrics of regions too.

  Attributes:
    positives: (N, K) as in `Tallies`.
    negatives: (N, K) as in `Tallies`.
    overlap: (N, K) float64, sum over the image's regions of the share of the
      region at or above each threshold.
    normal: (N,) bool, the images whose false positives AUPIMO uses.
    sizes: (N,) float64, pixels.
    regions: (N,) float64, number of regions.
  """

  positives: np.ndarray
  negatives: np.ndarray
  overlap: np.ndarray
  normal: np.ndarray
  sizes: np.ndarray
  regions: np.ndarray


# {metric: (B,) values} of (B, N) weights.
Measure = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def draw(labels: np.ndarray, draws: int, seed: int) -> np.ndarray:
  """Resamples images within each label.

  Args:
    labels: (N,) in {0, 1}.
    draws: number of draws.
    seed: of numpy's default generator.

  Returns:
    (draws, N) int64, the number of times each image occurs in each draw.
  """
  rng = np.random.default_rng(seed)
  weights = np.zeros((draws, len(labels)), np.int64)
  for label in (0, 1):
    images = np.flatnonzero(labels == label)
    if len(images):
      share = np.full(len(images), 1 / len(images))
      weights[:, images] = rng.multinomial(len(images), share, size=draws)
  return weights


def intervals(
  measure: Measure,
  weights: np.ndarray,
  exact: Mapping[str, float],
  level: float = 0.95,
) -> dict[str, list[float]]:
  """Percentile intervals.

  Args:
    measure: function from (B, N) weights to {metric: (B,) values}.
    weights: (draws, N) from `draw`.
    exact: {metric: value} on the full set; NaN gives [NaN, NaN].
    level: confidence level, in (0, 1).

  Returns:
    {metric: [low, high]} for the metrics of both `measure` and `exact`. Draws
    in which a metric is undefined do not count for its interval.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    whole = measure(np.ones((1, weights.shape[1])))
    batches = [
      measure(weights[k : k + _DRAWS_AT_ONCE].astype(np.float64))
      for k in range(0, len(weights), _DRAWS_AT_ONCE)
    ]
  tails = [50 * (1 - level), 50 * (1 + level)]
  ends = {}
  for name in exact.keys() & whole.keys():
    values = np.concatenate([batch[name] for batch in batches])
    values = values[~np.isnan(values)]
    if np.isnan(exact[name]) or not len(values):
      ends[name] = [float('nan')] * 2
      continue
    shift = exact[name] - whole[name][0]
    clipped = np.clip(np.percentile(values, tails) + shift, 0, 1)
    ends[name] = [float(end) for end in clipped]
  return ends


def tally_scores(scores: np.ndarray, labels: np.ndarray) -> Tallies:
  """`Tallies` of image scores (N,) and labels (N,); exact to 4096 scores."""
  marks = np.unique(scores)
  if len(marks) > _THRESHOLDS:
    marks = _quantiles(marks, _THRESHOLDS)
  marks = marks[::-1]
  above = scores[:, None] >= marks
  positives = (above & (labels == 1)[:, None]).astype(np.float64)
  return Tallies(positives, above - positives)


def tally_pixels(
  pixels: region.Pixels, normal: np.ndarray, thresholds: int = _THRESHOLDS
) -> PixelTallies:
  """The counts of the pixels at thresholds.

  Args:
    pixels: maps and regions of N images.
    normal: (N,) bool, the images whose false positives AUPIMO uses.
    thresholds: the highest number of thresholds.
  """
  thresholds = min(thresholds, max(256, _CELLS // len(pixels.sizes)))
  marks = _thresholds(pixels, normal, thresholds)
  shape = len(pixels.sizes), len(marks)
  positives, negatives, overlap = np.zeros((3, *shape))
  for index, areas in enumerate(pixels.areas):
    if not len(areas):
      negatives[index] = _at_least(np.sort(pixels.read(index)[0]), marks)
      continue
    scores, regions = pixels.read_regions(index)
    hit = np.flatnonzero(regions)
    negatives[index] = _at_least(np.sort(scores[regions == 0]), marks)
    hit = hit[np.argsort(scores[hit])]
    positives[index] = _at_least(scores[hit], marks)
    weight = (1.0 / areas)[regions[hit[::-1]] - 1]
    total = np.append(0.0, np.cumsum(weight))
    overlap[index] = total[positives[index].astype(int)]
  count = np.array([len(areas) for areas in pixels.areas], float)
  sizes = np.array(pixels.sizes, float)
  return PixelTallies(positives, negatives, overlap, normal, sizes, count)


def _at_least(ascending: np.ndarray, marks: np.ndarray) -> np.ndarray:
  """The number of `ascending` values at or above each mark."""
  return len(ascending) - np.searchsorted(ascending, marks)


def _thresholds(
  pixels: region.Pixels, normal: np.ndarray, count: int
) -> np.ndarray:
  """Descending thresholds: all distinct scores if few, else quantiles."""
  rng = np.random.default_rng(0)
  total = sum(pixels.sizes)
  both: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
  for index in range(len(pixels.sizes)):
    scores, regions = pixels.read(index)
    sides = [scores, scores[:0]]
    if regions is not None:
      sides = [scores[regions == 0], scores[regions > 0]]
    wholes = (total - pixels.positives, pixels.positives)
    for side, kept, whole in zip(sides, both, wholes, strict=True):
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


def _quantiles(values: np.ndarray, count: int) -> np.ndarray:
  """`count` of the sorted values at equal steps of rank; [] of no values."""
  if not len(values):
    return values
  return values[np.linspace(0, len(values) - 1, count).astype(int)]


def measure_ranking(
  tallies: Tallies | PixelTallies, weights: np.ndarray
) -> dict[str, np.ndarray]:
  """AUROC, AP and F1-max of draws.

  Args:
    tallies: counts of N images.
    weights: (B, N) the number of times each image counts.

  Returns:
    {'auroc', 'ap', 'f1_max': (B,) float64}, NaN where a class is missing.
  """
  tp, fp = weights @ tallies.positives, weights @ tallies.negatives
  metrics = {
    'auroc': _area(_from_zero(fp), _from_zero(tp), fp[:, -1]) / tp[:, -1],
    'ap': np.sum(
      np.diff(tp, axis=1, prepend=0) * tp / np.maximum(tp + fp, 1), axis=1
    )
    / tp[:, -1],
    'f1_max': np.max(2 * tp / (tp + fp + tp[:, -1:]), axis=1),
  }
  lacking = (tp[:, -1] == 0) | (fp[:, -1] == 0)
  return {k: np.where(lacking, np.nan, v) for k, v in metrics.items()}


def measure_regions(
  tallies: PixelTallies,
  weights: np.ndarray,
  limits: Sequence[float],
  bounds: tuple[float, float] = (1e-5, 1e-4),
) -> tuple[list[np.ndarray], np.ndarray]:
  """AU-PRO at each limit, and AUPIMO, of draws.

  Args:
    tallies: counts of the pixels of N images.
    weights: (B, N) the number of times each image counts.
    limits: FPR limits of AU-PRO.
    bounds: the lowest and highest shared FPR of AUPIMO.

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


def _from_zero(curve: np.ndarray) -> np.ndarray:
  """(B, K) with a column of zeros before it."""
  return np.pad(curve, ((0, 0), (1, 0)))


def _area(x: np.ndarray, y: np.ndarray, limit: np.ndarray) -> np.ndarray:
  """(B,) mean of (B, K) y over ascending (B, K) x from 0 to (B,) limit."""
  limit = limit[:, None]
  width = np.diff(x, axis=1)
  used = np.clip(limit - x[:, :-1], 0, width)
  slope = np.diff(y, axis=1) / np.where(width > 0, width, 1)
  return np.sum(used * (y[:, :-1] + slope * used / 2), axis=1) / limit[:, 0]
