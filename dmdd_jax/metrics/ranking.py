"""Ranking metrics, exact with ties: AUROC, average precision and F1-max.

Synopsis:

  auroc, ap, f1, threshold = ranking.ranking(scores, labels)

These metrics, and AU-PRO, need only a few counts at each distinct score of a
positive. `steps` computes the counts from the highest score down, in blocks of
bounded size. A set larger than memory costs more passes over the data, not
more memory. Nothing is binned, and no global argsort is made: each block's
anomaly-free scores are sorted once, without labels, and the counts are looked
up in them.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import functools
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dmdd_jax.metrics import store as store_lib

# Reads an image by its index: scores (n,), groups (n,) or None, and weights
# (G + 1,) or None, as described in `steps`.
Read = Callable[[int], tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]

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

  def __init__(self, positives: int, negatives: int):
    """Starts at zero; takes the number of all positives and negatives."""
    self._positives, self._negatives = positives, negatives
    self._hits = 0
    self._wins = 0  # twice the Mann-Whitney statistic, exact
    self._ap = 0.0
    self._f1, self._threshold = -1.0, float('nan')

  def add(self, block: Steps) -> None:
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

  def result(self) -> Ranking:
    """Returns the `Ranking` of all blocks added; NaN without both labels."""
    if not self._positives or not self._negatives:
      return Ranking(np.nan, np.nan, np.nan, np.nan)
    pairs = 2 * self._positives * self._negatives
    return Ranking(
      self._wins / pairs,
      self._ap / self._positives,
      self._f1,
      self._threshold,
    )


def ranking(scores: npt.ArrayLike, labels: npt.ArrayLike) -> Ranking:
  """AUROC, AP and F1-max of scores against binary labels.

  AUROC counts a tie of a positive and a negative as half. AP is the sum of
  precision times the step in recall over the distinct scores, without
  interpolation, as in scikit-learn's `average_precision_score`. F1-max is the
  highest F1 over the thresholds "score >= t". If several thresholds give it,
  the highest of them is returned.

  Args:
    scores: finite numbers of any shape, higher means more anomalous.
    labels: the same shape, in {0, 1}.

  Returns:
    A `Ranking` of fractions, all NaN unless both labels occur. With one class
    AUROC has no pairs, and precision is 0 or 1 at every threshold.

  Raises:
    ValueError: on shapes that disagree, other labels, non-finite scores.
  """
  flat = store_lib.check_scores(scores, 'scores').ravel()
  truth = np.ravel(labels)
  if flat.shape != truth.shape:
    raise ValueError(f'scores have {flat.size} entries and labels {truth.size}')
  truth = store_lib.check_labels(truth)
  positives = int(np.count_nonzero(truth))
  sums = RankingSums(positives, truth.size - positives)
  if 0 < positives < truth.size:
    chunk = 2**19
    starts = range(0, truth.size, chunk)

    def read(index: int) -> tuple[np.ndarray, np.ndarray, None]:
      part = slice(starts[index], starts[index] + chunk)
      return flat[part], truth[part], None

    sizes = [min(chunk, truth.size - start) for start in starts]
    for block in steps(read, sizes):
      sums.add(block)
  return sums.result()


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
  """Area under the ROC curve; see `ranking`."""
  return ranking(scores, labels).auroc


def roc_curve(
  scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """Every corner of the ROC curve, for plotting; a tie is one straight line.

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
      f'a ROC curve needs both labels, got {int(labels.sum())} positives of'
      f' {labels.size} and {scores.size} scores'
    )
  order = np.argsort(-scores, kind='stable')
  last = np.append(np.diff(scores[order]) != 0, True)
  hits, alarms = np.cumsum(labels[order]), np.cumsum(1 - labels[order])
  fpr, tpr = (
    np.append(0.0, count[last] / count[-1]) for count in (alarms, hits)
  )
  return fpr, tpr


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
  """Average precision; see `ranking`."""
  return ranking(scores, labels).ap


def f1_max(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, float]:
  """The highest F1 and the threshold "score >= t" it needs; see `ranking`."""
  result = ranking(scores, labels)
  return result.f1_max, result.f1_max_threshold


def steps(
  read: Read, sizes: Sequence[int], block_pixels: int | None = None
) -> Iterator[Steps]:
  """Yields blocks of `Steps` over a set of images, highest scores first.

  Memory depends on the size of a block, not on the size of the set: the range
  of scores is cut at quantiles of a sample, and each block gathers its own
  scores in a pass over the images. A score that fills a block by itself
  (saturated maps) is counted without being gathered. The cuts do not change the
  result.

  Args:
    read: function of the image's index to (scores, groups, weights): scores
      (n,) floats; groups (n,) integers, > 0 on positives, or None if there are
      none; weights (G + 1,) float64, the weight of a positive of each group,
      or None for 1.
    sizes: n of each image.
    block_pixels: approximate number of pixels to hold at a time; a positive
      counts as six. By default a quarter of the set, at least 2**20.

  Yields:
    Non-empty `Steps`; nothing if there are no positives.
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
  def single(self) -> bool:
    """Whether the cell holds one score alone."""
    return self.low is not None and self.low == self.high

  def holds(self, scores: np.ndarray) -> np.ndarray | None:
    """Which of the (n,) scores are in the cell, (n,) bool; None for all."""
    if self.single:
      return scores == self.low
    inside: np.ndarray | None = None
    if self.low is not None:
      inside = scores >= self.low if self.closed else scores > self.low
    if self.high is not None:
      below = scores < self.high
      inside = below if inside is None else np.logical_and(inside, below, below)
    return inside


def _cells(read: Read, sizes: Sequence[int], block_pixels: int) -> list[_Cell]:
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
  cells: list[_Cell] = []
  low, closed = None, False
  for cut, repeat in zip(cuts, repeats, strict=True):
    cells.append(_Cell(low, closed, cut))
    low, closed = cut, repeat == 1
    if repeat > 1:
      cells.append(_Cell(cut, True, cut))
  cells.append(_Cell(low, closed, None))
  return cells[::-1]


def _sample(read: Read, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
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
  joined = np.concatenate(scores)
  order = np.argsort(joined)
  return joined[order], np.concatenate(cost)[order]


class _Part(NamedTuple):
  """One worker's scores of a cell; of a single-score cell only the counts."""

  negatives: np.ndarray  # (n,) scores, ascending
  positives: np.ndarray  # (p,) scores
  weights: np.ndarray  # (p,) of the positives; their sums in a single cell
  counts: np.ndarray  # (2,) of negatives and positives, in a single cell


def _gather(read: Read, cell: _Cell, images: Sequence[int]) -> _Part:
  """Collects the scores of a cell from the images of these indices."""
  negatives: list[np.ndarray] = []
  positives: list[np.ndarray] = []
  weights: list[np.ndarray] = []
  counts = np.zeros(2, np.int64)
  for index in images:
    scores, groups, weight = read(index)
    inside = cell.holds(scores)
    if groups is None:
      if inside is None:
        negatives.append(scores)
      elif cell.single:
        counts[0] += np.count_nonzero(inside)
      else:
        negatives.append(scores[inside])
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
  ascending = _join(negatives)
  ascending.sort()
  return _Part(ascending, _join(positives), _join(weights), counts)


def _join(arrays: list[np.ndarray]) -> np.ndarray:
  """Concatenates arrays and empties the list."""
  # Empty ones are dropped: their dtype could widen the result.
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


def _block(
  parts: Sequence[_Part],
  cell: _Cell,
  above: int,
  pool: concurrent.futures.Executor,
) -> tuple[Steps, int]:
  """The `Steps` of a cell and the number of its negatives."""
  if cell.single:
    negatives, hits = np.sum([part.counts for part in parts], axis=0)
    weight = sum(part.weights.sum() for part in parts)
    step = slice(0, int(hits > 0))  # Empty without positives.
    return Steps(
      np.array([cell.low])[step],
      np.array([hits])[step],
      np.array([weight])[step],
      np.array([above])[step],
      np.array([above + negatives])[step],
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
  lower = np.zeros(len(score), np.int64)
  for count in pool.map(lambda p: np.searchsorted(p.negatives, score), parts):
    lower += count
  higher = np.zeros(len(score), np.int64)
  for count in pool.map(
    lambda p: np.searchsorted(p.negatives, score, 'right'), parts
  ):
    higher += count
  return Steps(
    score[::-1],
    np.diff(starts, append=len(positives))[::-1],
    np.add.reduceat(weights, starts)[::-1],
    (above + total - higher)[::-1],
    (above + total - lower)[::-1],
  ), total
