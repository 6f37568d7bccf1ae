"""Counts of scores at thresholds, image by image, and the metrics of any sum.

The metrics of a set without one image, or of a set drawn from the images, need
no second sort of the pixels: the counts of each image at up to 1024 thresholds
are made once. They add up over images, and every metric is a function of the
sums.

With no more distinct scores than thresholds this is exact. Otherwise the scores
between two thresholds are merged as if they tied. The thresholds are quantiles
of the scores, dense where the metrics look.

Synopsis:

  groups, labels = tallies.groups(labels)
  counts = tallies.tally_scores(scores, labels, groups)
  each = tallies.measure_ranking(tallies.without_each(counts))
"""

from collections.abc import Sequence
import concurrent.futures
import functools
from typing import NamedTuple, TypeVar

import numpy as np

from dmdd_jax.metrics import aupimo as aupimo_lib
from dmdd_jax.metrics import places
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import region

_THRESHOLDS = 1024
_SAMPLE = 2**17
# Of each label. More images than that are put together, so that the counts of
# ten thousand images need no more memory than those of a few hundred.
_GROUPS = 100


class Tallies(NamedTuple):
  """Counts at K thresholds, of G images or groups of images.

  Attributes:
    positives: (G, K) float64, positives at or above each of K thresholds. The
      thresholds descend, and the last one is below every score or the lowest.
    negatives: (G, K) float64, likewise.
  """

  positives: np.ndarray
  negatives: np.ndarray


class PixelTallies(NamedTuple):
  """Counts of pixels at K thresholds, for the metrics of regions too.

  Attributes:
    positives: (G, K) as in `Tallies`.
    negatives: (G, K) as in `Tallies`.
    overlap: (G, K) float64, sum over the regions of the share of the region at
      or above each threshold.
    regions: (G,) float64, number of regions.
    alarms: (G, K) float64, sum over the normal images, whose false positives
      AUPIMO uses, of the share of their pixels at or above each threshold.
    normal: (G,) float64, number of these images.
    recall: (G, K) float64, sum over the images with a defect of the share of
      their defect pixels at or above each threshold.
    defective: (G,) float64, number of these images.
  """

  positives: np.ndarray
  negatives: np.ndarray
  overlap: np.ndarray
  regions: np.ndarray
  alarms: np.ndarray
  normal: np.ndarray
  recall: np.ndarray
  defective: np.ndarray


_AnyTallies = TypeVar('_AnyTallies', Tallies, PixelTallies)


def groups(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Puts images of a label together where there are very many.

  Args:
    labels: (N,) in {0, 1}.

  Returns:
    (N,) int64, the group of each image, and (G,), the label of each group. With
    at most 100 images of each label every image is a group of its own.
  """
  group = np.zeros(len(labels), np.int64)
  kinds: list[int] = []
  for label in (0, 1):
    images = np.flatnonzero(labels == label)
    count = min(len(images), _GROUPS)
    group[images] = len(kinds) + np.arange(len(images)) % max(count, 1)
    kinds += [label] * count
  return group, np.array(kinds, np.int64)


def weighted(counts: _AnyTallies, weights: np.ndarray) -> _AnyTallies:
  """The counts (B, K) of B sets in which each group occurs (B, G) times."""
  return type(counts)(*(weights @ field for field in counts))


def without_each(counts: _AnyTallies) -> _AnyTallies:
  """The counts of the G sets that lack one of the groups each."""
  return type(counts)(*map(_sums_without_each, counts))


def _sums_without_each(field: np.ndarray) -> np.ndarray:
  """(G, ...) sums of (G, ...) over all rows but one."""
  # Not the total less the row: where all others are 0 the sum must be 0.
  sums = np.zeros_like(field)
  np.cumsum(field[:-1], axis=0, out=sums[1:])
  sums[:-1] += np.cumsum(field[:0:-1], axis=0)[::-1]
  return sums


def tally_scores(
  scores: np.ndarray, labels: np.ndarray, group: np.ndarray
) -> Tallies:
  """The counts of image scores.

  Args:
    scores: (N,) floats.
    labels: (N,) in {0, 1}.
    group: (N,) of `groups`.
  """
  marks = np.unique(scores)
  if len(marks) > _THRESHOLDS:
    marks = _quantiles(marks, _THRESHOLDS)
  positives, negatives = np.zeros((2, int(group.max()) + 1, len(marks)))
  above = scores[:, None] >= marks[::-1]
  np.add.at(positives, group[labels == 1], above[labels == 1])
  np.add.at(negatives, group[labels == 0], above[labels == 0])
  return Tallies(positives, negatives)


def tally_pixels(
  pixels: region.Pixels, normal: np.ndarray, group: np.ndarray
) -> PixelTallies:
  """The counts of pixels.

  Args:
    pixels: maps and regions of N images.
    normal: (N,) bool, the images whose false positives AUPIMO uses.
    group: (N,) of `groups`.
  """
  thresholds = _thresholds(pixels, normal)
  marks = places.prepare(thresholds[np.isfinite(thresholds)][::-1])
  tally = functools.partial(
    _tally, pixels, normal, group, marks, len(thresholds)
  )
  workers = ranking.WORKERS
  shares = [range(k, len(group), workers) for k in range(workers)]
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    parts = pool.map(tally, shares)
    return functools.reduce(
      lambda a, b: PixelTallies(*map(np.add, a, b)), parts
    )


def _tally(
  pixels: region.Pixels,
  normal: np.ndarray,
  group: np.ndarray,
  marks: places.Marks,
  size: int,
  images: Sequence[int],
) -> PixelTallies:
  """`tally_pixels` of these images, at the marks and, if K is more, at -inf.

  Args:
    pixels: as of `tally_pixels`.
    normal: likewise.
    group: likewise.
    marks: the finite thresholds.
    size: K.
    images: indices.
  """

  def at_least(
    upto: np.ndarray, weights: np.ndarray | None = None
  ) -> np.ndarray:
    counts = np.bincount(upto, weights, minlength=len(marks.values) + 1)
    return np.cumsum(counts[::-1])[:size]

  count = int(group.max()) + 1
  positives, negatives, overlap, alarms, recall = np.zeros((5, count, size))
  regions, normals, defective = np.zeros((3, count))
  for index in images:
    row, areas = group[index], pixels.areas[index]
    upto = places.upto(marks, pixels.read(index))
    above = at_least(upto)
    if len(areas):
      hits, indices = pixels.read_hits(index)
      upto = upto[hits]
      detected = at_least(upto)
      above -= detected
      positives[row] += detected
      overlap[row] += at_least(upto, (1.0 / areas)[indices])
      recall[row] += detected / len(hits)
      regions[row] += len(areas)
      defective[row] += 1
    negatives[row] += above
    if normal[index]:
      alarms[row] += above / pixels.sizes[index]
      normals[row] += 1
  return PixelTallies(
    positives, negatives, overlap, regions, alarms, normals, recall, defective
  )


def _thresholds(pixels: region.Pixels, normal: np.ndarray) -> np.ndarray:
  """Descending thresholds: all distinct scores if few, else quantiles."""
  rng = np.random.default_rng(0)
  wholes = pixels.negatives, pixels.positives
  both: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
  for index in range(len(pixels.sizes)):
    scores, hits = pixels.read(index), pixels.read_hits(index)[0]
    counts = len(scores) - len(hits), len(hits)
    picks = [
      rng.integers(count, size=-(-_SAMPLE * count // whole))
      if whole > _SAMPLE and count
      else np.arange(count)
      for count, whole in zip(counts, wholes, strict=True)
    ]
    # The k-th normal pixel comes after k others and the defects before it.
    before = np.searchsorted(hits - np.arange(len(hits)), picks[0], 'right')
    both[0].append(scores[picks[0] + before])
    both[1].append(scores[hits[picks[1]]])
  negatives, positives = (np.sort(np.concatenate(side)) for side in both)
  everything = _distinct(pixels, np.union1d(negatives, positives))
  if everything is not None:
    return everything[::-1]
  part = _THRESHOLDS // 4
  tail = negatives[int(0.95 * len(negatives)) :]
  marks = [_quantiles(side, part) for side in (negatives, tail, positives)]
  if not aupimo_lib.aupimo_undefined(pixels, normal):
    marks.append(
      _quantiles(aupimo_lib.shared_fpr(pixels, normal, 2e-4)[0], part)
    )
  joined = np.unique(np.concatenate(marks))
  return np.append(joined[::-1], np.array(-np.inf, joined.dtype))


def _distinct(pixels: region.Pixels, sample: np.ndarray) -> np.ndarray | None:
  """All distinct scores, ascending; None if more than the thresholds.

  Args:
    pixels: of N images.
    sample: distinct scores of a part of the pixels.
  """
  for index in range(len(pixels.sizes)):
    if len(sample) > _THRESHOLDS:
      return None
    sample = np.union1d(sample, pixels.read(index))
  return sample if len(sample) <= _THRESHOLDS else None


def _quantiles(values: np.ndarray, count: int) -> np.ndarray:
  """`count` of the sorted values at equal steps of rank; [] of no values."""
  if not len(values):
    return values
  return values[np.linspace(0, len(values) - 1, count).astype(int)]


def measure_ranking(counts: Tallies | PixelTallies) -> dict[str, np.ndarray]:
  """AUROC, AP and F1-max of each of G sets.

  Returns:
    {'auroc', 'ap', 'f1_max': (G,) float64}, NaN where a class is missing.
  """
  tp, fp = counts.positives, counts.negatives
  with np.errstate(divide='ignore', invalid='ignore'):
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
  counts: PixelTallies,
  limits: Sequence[float],
  bounds: tuple[float, float] = (1e-5, 1e-4),
) -> tuple[list[np.ndarray], np.ndarray]:
  """AU-PRO at each limit, and AUPIMO, of each of G sets.

  Args:
    counts: of the pixels of G sets.
    limits: FPR limits of AU-PRO.
    bounds: the lowest and highest shared FPR of AUPIMO.

  Returns:
    List of (G,) AU-PRO, and (G,) AUPIMO; NaN without regions, anomaly-free
    pixels or normal images.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    fp = _from_zero(counts.negatives)
    pro = _from_zero(counts.overlap / counts.regions[:, None])
    pros = [_area(fp, pro, limit * fp[:, -1]) for limit in limits]
    rate = _from_zero(counts.alarms / counts.normal[:, None])
    recall = _from_zero(counts.recall / counts.defective[:, None])
    pimo = aupimo_lib.log_area(
      rate[:, :-1], rate[:, 1:], recall[:, :-1], recall[:, 1:], bounds
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
