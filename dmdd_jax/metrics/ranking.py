"""Ranking metrics, exact with ties: AUROC, average precision and F1-max.

  auroc, ap, f1, threshold = ranking.ranking(scores, labels)

All of them, and AU-PRO too, depend on the scores only through a few counts at
each distinct score of a positive. `steps` finds these from the highest score
down in blocks of bounded size, so a set larger than memory costs more passes
over the data, not more memory; nothing is binned and no global argsort is
made. Each block's anomaly-free scores are sorted once, without labels, and the
counts are looked up in them.
"""

import concurrent.futures
import functools
import os
from typing import NamedTuple

import numpy as np

from dmdd_jax.metrics import store as store_lib

# Pixels of a block, counting a positive as _POSITIVE_COST anomaly-free ones,
# for it is argsorted with its weight.
_BLOCK = 2**20
_POSITIVE_COST = 6
_SAMPLE = 2**16
_WORKERS = min(2, os.cpu_count() or 1)


class Steps(NamedTuple):
  """The counts at each distinct score of a positive, highest score first.

  Attributes:
    score: (K,) the scores.
    hits: (K,) int64 positives at exactly this score.
    weight: (K,) float64 sum of the weights of these positives.
    above: (K,) int64 negatives with a higher score.
    upto: (K,) int64 negatives with at least this score.
  """

  score: np.ndarray
  hits: np.ndarray
  weight: np.ndarray
  above: np.ndarray
  upto: np.ndarray


class Ranking(NamedTuple):
  """AUROC, average precision, F1-max and its threshold; NaN if undefined."""

  auroc: float
  ap: float
  f1_max: float
  f1_max_threshold: float


class RankingSums:
  """Adds up AUROC, AP and F1-max over blocks of steps."""

  def __init__(self, positives, negatives):
    self._positives, self._negatives = positives, negatives
    self._hits = 0
    self._wins = 0  # twice the Mann-Whitney statistic, exact
    self._ap = 0.0
    self._f1, self._threshold = -1.0, np.nan

  def add(self, block):
    """Takes the next block of `Steps`, in descending order of score."""
    beaten = 2 * self._negatives - block.above - block.upto
    self._wins += int(np.dot(block.hits, beaten))
    hits = self._hits + np.cumsum(block.hits)
    self._hits = int(hits[-1])
    self._ap += float(np.sum(block.hits * (hits / (hits + block.upto))))
    f1 = 2.0 * hits / (hits + block.upto + self._positives)
    best = int(np.argmax(f1))
    if f1[best] > self._f1:
      self._f1, self._threshold = float(f1[best]), float(block.score[best])

  def result(self):
    """Returns the `Ranking` of all that was added."""
    if not self._positives or not self._negatives:
      return Ranking(np.nan, np.nan, np.nan, np.nan)
    pairs = 2 * self._positives * self._negatives
    return Ranking(
      self._wins / pairs,
      self._ap / self._positives,
      self._f1,
      self._threshold,
    )


def ranking(scores, labels):
  """AUROC, AP and F1-max of scores against binary labels.

  AUROC counts a tie of a positive and a negative as half. AP is the sum of
  precision times the step in recall over the distinct scores (no
  interpolation), as scikit-learn's `average_precision_score`. F1-max is the
  highest F1 over the thresholds "score >= t"; of several best thresholds the
  highest is returned.

  Args:
    scores: finite numbers of any shape, higher means more anomalous.
    labels: the same shape, in {0, 1}.

  Returns:
    A `Ranking` of fractions; all NaN unless both labels occur (with one class
    alone AUROC has no pairs, and precision is 0 or 1 at every threshold).

  Raises:
    ValueError: on shapes that disagree, other labels, non-finite scores.
  """
  scores = store_lib.check_scores(scores, 'scores').ravel()
  labels = np.asarray(labels).ravel()
  if scores.shape != labels.shape:
    raise ValueError(
      f'scores have {scores.size} entries and labels {labels.size}'
    )
  labels = store_lib.check_labels(labels)
  positives = int(np.count_nonzero(labels))
  sums = RankingSums(positives, labels.size - positives)
  if 0 < positives < labels.size:
    chunk = 2**19
    starts = range(0, labels.size, chunk)

    def read(index):
      part = slice(starts[index], starts[index] + chunk)
      return scores[part], labels[part], None

    sizes = [min(chunk, labels.size - start) for start in starts]
    for block in steps(read, sizes):
      sums.add(block)
  return sums.result()


def auroc(scores, labels):
  """Area under the ROC curve; see `ranking`."""
  return ranking(scores, labels).auroc


def roc_curve(scores, labels):
  """Every corner of the ROC curve, for plotting; ties are one straight line.

  Args:
    scores: (N,) finite numbers, higher means more anomalous.
    labels: (N,) in {0, 1}.

  Returns:
    (K,) false-positive rate and (K,) true-positive rate, ascending from (0, 0)
    to (1, 1).

  Raises:
    ValueError: unless both labels occur; as `ranking`.
  """
  scores = store_lib.check_scores(scores, 'scores')
  labels = store_lib.check_labels(labels).astype(np.int64)
  if scores.shape != labels.shape or not 0 < labels.sum() < labels.size:
    raise ValueError(
      f'a ROC curve needs both labels, found {int(labels.sum())} positives of'
      f' {labels.size} and {scores.size} scores'
    )
  order = np.argsort(-scores, kind='stable')
  last = np.append(np.diff(scores[order]) != 0, True)
  hits, alarms = np.cumsum(labels[order]), np.cumsum(1 - labels[order])
  return tuple(
    np.append(0.0, count[last] / count[-1]) for count in (alarms, hits)
  )


def average_precision(scores, labels):
  """Average precision; see `ranking`."""
  return ranking(scores, labels).ap


def f1_max(scores, labels):
  """The highest F1 and the threshold "score >= t" it needs; see `ranking`."""
  result = ranking(scores, labels)
  return result.f1_max, result.f1_max_threshold


def steps(read, sizes, block_pixels=None):
  """Yields blocks of `Steps` over a set of images, highest scores first.

  Memory is bounded by the block, not by the set: the range of scores is cut at
  quantiles of a sample, and each block gathers its own scores in a pass over
  the images. A score that fills a block by itself (saturated maps) is counted
  without being gathered. The cuts do not change the result.

  Args:
    read: function of the image's index to (scores, groups, weights): scores
      (n,) floats; groups (n,) integers, > 0 on positives, or None if there are
      none; weights (G + 1,) float64, the weight of a positive of each group,
      or None for 1.
    sizes: n of each image.
    block_pixels: about how many pixels to hold at a time; a positive counts
      for six. By default a quarter of the set, at least 2**20.

  Yields:
    Non-empty `Steps`; none at all without positives.
  """
  block_pixels = block_pixels or max(_BLOCK, sum(sizes) // 4)
  above = 0
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    workers = _WORKERS if sum(sizes) > 2**18 else 1
    shares = [range(k, len(sizes), workers) for k in range(workers)]
    for cell in _cells(read, sizes, block_pixels):
      parts = list(pool.map(functools.partial(_gather, read, cell), shares))
      block, negatives = _block(parts, cell, above, pool)
      above += negatives
      if block.score.size:
        yield block


class _Cell(NamedTuple):
  """A range of scores: low < or <= score < high, or score == low == high."""

  low: float | None
  closed: bool
  high: float | None

  @property
  def single(self):
    return self.low is not None and self.low == self.high

  def holds(self, scores):
    """The (n,) bool of scores in the cell, or None for all of them."""
    if self.single:
      return scores == self.low
    inside = None
    if self.low is not None:
      inside = scores >= self.low if self.closed else scores > self.low
    if self.high is not None:
      below = scores < self.high
      inside = below if inside is None else np.logical_and(inside, below, below)
    return inside


def _cells(read, sizes, block_pixels):
  """Cuts the scores into cells of about `block_pixels`, highest first."""
  total = sum(sizes)
  if total * _POSITIVE_COST <= block_pixels:
    return [_Cell(None, False, None)]
  scores, cost = _sample(read, sizes)
  blocks = int(np.ceil(total * cost.mean() / block_pixels))
  cost = np.cumsum(cost)
  marks = cost[-1] * np.arange(1, blocks) / blocks
  cuts, repeats = np.unique(
    scores[np.searchsorted(cost, marks)], return_counts=True
  )
  cells, low, closed = [], None, False
  for cut, repeat in zip(cuts, repeats, strict=True):
    cells.append(_Cell(low, closed, cut))
    low, closed = cut, repeat == 1
    if repeat > 1:
      cells.append(_Cell(cut, True, cut))
  cells.append(_Cell(low, closed, None))
  return cells[::-1]


def _sample(read, sizes):
  """Scores of random pixels, ascending, and what each costs in a block."""
  rng = np.random.default_rng(0)
  scores, cost = [], []
  for index, size in enumerate(sizes):
    image, groups, _ = read(index)
    if not size:
      continue
    picks = rng.integers(size, size=-(-_SAMPLE * size // sum(sizes)))
    scores.append(image[picks])
    hit = 0 if groups is None else groups[picks] > 0
    cost.append(np.where(hit, _POSITIVE_COST, 1) * np.ones(len(picks)))
  scores, cost = np.concatenate(scores), np.concatenate(cost)
  order = np.argsort(scores)
  return scores[order], cost[order]


class _Part(NamedTuple):
  """What one worker found in a cell; of a single-score cell only counts."""

  negatives: np.ndarray  # sorted
  positives: np.ndarray
  weights: np.ndarray
  counts: tuple  # of negatives and positives


def _gather(read, cell, images):
  """Collects the scores of a cell from some images into a `_Part`."""
  negatives, positives, weights, counts = [], [], [], np.zeros(2, np.int64)
  for index in images:
    scores, groups, weight = read(index)
    inside = cell.holds(scores)
    if groups is None:
      if cell.single:
        counts[0] += np.count_nonzero(inside)
      else:
        negatives.append(scores if inside is None else scores[inside])
      continue
    if inside is not None:
      groups = groups[inside]
    hit = groups > 0
    groups = groups[hit]
    weights.append(np.ones(len(groups)) if weight is None else weight[groups])
    if cell.single:
      counts += (len(hit) - len(groups), len(groups))
      weights[-1] = weights[-1].sum(keepdims=True)
      continue
    scores = scores if inside is None else scores[inside]
    positives.append(scores[hit])
    negatives.append(scores[~hit])
  negatives = _join(negatives)
  negatives.sort()
  return _Part(negatives, _join(positives), _join(weights), tuple(counts))


def _join(arrays):
  """Concatenates arrays and empties the list."""
  # Empty ones are left out, for their dtype would widen the result.
  arrays[:] = [array for array in arrays if len(array)]
  if not arrays:
    return np.empty(0)
  joined = np.empty(
    sum(map(len, arrays)), np.result_type(*{a.dtype for a in arrays})
  )
  end = len(joined)
  while arrays:  # each piece is freed once copied, for the peak's sake
    array = arrays.pop()
    joined[end - len(array) : end] = array
    end -= len(array)
  return joined


def _block(parts, cell, above, pool):
  """The `Steps` of a cell and how many negatives it holds."""
  if cell.single:
    negatives, hits = np.sum([part.counts for part in parts], axis=0)
    weight = sum(part.weights.sum() for part in parts)
    found = slice(0, int(hits > 0))
    return Steps(
      np.array([cell.low])[found],
      np.array([hits])[found],
      np.array([weight])[found],
      np.array([above])[found],
      np.array([above + negatives])[found],
    ), int(negatives)
  total = sum(len(part.negatives) for part in parts)
  positives = _join([part.positives for part in parts])
  if not len(positives):
    none = np.empty(0)
    return Steps(none, none, none, none, none), total
  order = np.argsort(positives)
  positives = positives[order]
  starts = np.flatnonzero(np.append(True, positives[1:] != positives[:-1]))
  score = positives[starts]
  weights = _join([part.weights for part in parts])[order]
  lower = sum(pool.map(lambda p: np.searchsorted(p.negatives, score), parts))
  higher = sum(
    pool.map(lambda p: np.searchsorted(p.negatives, score, 'right'), parts)
  )
  return Steps(
    score[::-1],
    np.diff(starts, append=len(positives))[::-1],
    np.add.reduceat(weights, starts)[::-1],
    (above + total - higher)[::-1],
    (above + total - lower)[::-1],
  ), total
