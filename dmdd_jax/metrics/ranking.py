"""Ranking metrics, exact with ties: AUROC, average precision and F1-max.

Synopsis:

  auroc, ap, f1, threshold = ranking.ranking(scores, labels)

These metrics, and AU-PRO, need only a few counts at each distinct score of a
positive. `steps` computes the counts from the highest score down, in blocks of
bounded size. A set larger than memory costs more passes over the data, not
more memory. The scores of positives, which are few, are sorted. All others are
only counted between them (see `places`): they are neither sorted nor copied.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import functools
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dmdd_jax.metrics import places
from dmdd_jax.metrics import store as store_lib

# Reads an image by its index: scores (n,), hits (p,) or None, and weights (p,)
# or None, as described in `steps`.
Read = Callable[[int], tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]

# Positives of a block: about 100 bytes each, with the tables to look them up.
_BLOCK = 2**22
_SAMPLE = 2**16
# Threads: two cores gain most of what there is.
WORKERS = min(2, os.cpu_count() or 1)


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
      return flat[part], np.flatnonzero(truth[part]), None

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
  read: Read,
  sizes: Sequence[int],
  block: int | None = None,
  head: float = 1.0,
) -> Iterator[Steps]:
  """Yields blocks of `Steps` over a set of images, highest scores first.

  Memory depends on the size of a block, not on the size of the set: the range
  of scores is cut at quantiles of a sample of the positives, and each block
  takes its own scores in two passes over the images. A score that fills a block
  by itself (saturated maps) is counted without being gathered. The cuts do not
  change the result.

  Args:
    read: function of the image's index to (scores, hits, weights): scores (n,)
      floats; hits (p,) integers, the indices of the positives, or None if there
      are none; weights (p,) float64 of the positives, or None for 1.
    sizes: n of each image.
    block: approximate number of positives to hold at a time.
    head: share of the highest scores after which a block ends, about, for a
      caller that needs no more; 1 or more for none.

  Yields:
    Non-empty `Steps`; nothing if there are no positives.
  """
  above = 0
  with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
    workers = WORKERS if sum(sizes) > 2**18 else 1
    shares = [range(k, len(sizes), workers) for k in range(workers)]
    table = sum(sizes) >= places.CHUNK
    for cell in _cells(read, sizes, block or _BLOCK, head):
      counted, negatives = _block(read, cell, above, shares, table, pool)
      above += negatives
      if counted.score.size:
        yield counted


class _Cell(NamedTuple):
  """A range of scores: low < or <= score < high, or score == low == high."""

  low: float | None
  closed: bool
  high: float | None

  @property
  def single(self) -> bool:
    """Whether the cell holds one score alone."""
    return self.low is not None and self.low == self.high

  def take(self, scores: np.ndarray) -> np.ndarray:
    """Those of the (n,) scores that are in the cell."""
    inside = self.holds(scores)
    return scores if inside is None else scores[inside]

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


def _cells(
  read: Read, sizes: Sequence[int], block: int, head: float
) -> list[_Cell]:
  """Cuts the scores into cells of about `block` positives, highest first."""
  sample, everything, total = _sample(read, sizes)
  if not total:
    return []
  blocks = -(-total // block)
  marks = sample[len(sample) * np.arange(1, blocks) // blocks]
  if head < 1:
    marks = np.append(marks, everything[int((1 - head) * len(everything))])
  cuts, repeats = np.unique(marks, return_counts=True)
  cells: list[_Cell] = []
  low, closed = None, False
  for cut, repeat in zip(cuts, repeats, strict=True):
    cells.append(_Cell(low, closed, cut))
    low, closed = cut, repeat == 1
    if repeat > 1:
      cells.append(_Cell(cut, True, cut))
  cells.append(_Cell(low, closed, None))
  return cells[::-1]


def _sample(
  read: Read, sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, int]:
  """Draws scores.

  Returns:
    Scores of random positives and of random pixels, both ascending, and the
    number of all positives.
  """
  rng = np.random.default_rng(0)
  share = min(1.0, _SAMPLE / max(sum(sizes), 1))
  positives: list[np.ndarray] = []
  scores: list[np.ndarray] = []
  total = 0
  for index in range(len(sizes)):
    image, hits, _ = read(index)
    picks = rng.integers(max(len(image), 1), size=int(len(image) * share) + 1)
    scores.append(image[picks[: len(image)]])
    if hits is not None and len(hits):
      total += len(hits)
      picks = rng.integers(len(hits), size=int(len(hits) * share) + 1)
      positives.append(image[hits[picks]])
  return np.sort(_join(positives)), np.sort(_join(scores)), total


def _join(arrays: list[np.ndarray]) -> np.ndarray:
  """Concatenates arrays; empty ones do not widen the dtype."""
  arrays = [array for array in arrays if len(array)]
  return np.concatenate(arrays) if arrays else np.empty(0)


def _positives(read: Read, cell: _Cell, images: Sequence[int]) -> np.ndarray:
  """(p,) scores of the positives of a cell."""
  scores = []
  for index in images:
    image, hits, _ = read(index)
    if hits is not None:
      scores.append(cell.take(image[hits]))
  return _join(scores)


class _Counts(NamedTuple):
  """Counts at the K marks of a cell."""

  places: np.ndarray  # (2 K + 1,) int64, all scores, see `places`
  hits: np.ndarray  # (K,) int64
  weight: np.ndarray  # (K,) float64


def _count(
  read: Read, cell: _Cell, marks: places.Marks, images: Sequence[int]
) -> _Counts:
  """Counts the scores of a cell in these images."""
  size = len(marks.values)
  counts = _Counts(
    np.zeros(2 * size + 1, np.int64), np.zeros(size, np.int64), np.zeros(size)
  )
  for index in images:
    scores, hits, weight = read(index)
    for start in range(0, len(scores), places.CHUNK):
      chunk = cell.take(scores[start : start + places.CHUNK])
      places.count(marks, chunk, counts.places)
    if hits is None:
      continue
    scores = scores[hits]
    inside = cell.holds(scores)
    if inside is not None:
      scores = scores[inside]
      weight = weight if weight is None else weight[inside]
    place = places.find(marks, scores) >> 1
    np.add.at(counts.hits, place, 1)
    np.add.at(counts.weight, place, 1.0 if weight is None else weight)
  return counts


def _block(
  read: Read,
  cell: _Cell,
  above: int,
  shares: Sequence[Sequence[int]],
  table: bool,
  pool: concurrent.futures.Executor,
) -> tuple[Steps, int]:
  """The `Steps` of a cell and the number of its negatives."""
  if cell.single:
    score = np.array([cell.low])
  else:
    gather = functools.partial(_positives, read, cell)
    score = _join(list(pool.map(gather, shares)))
    score.sort()
    score = score[np.append(True, score[1:] != score[:-1])[: len(score)]]
  marks = places.prepare(score, table)
  parts = pool.map(functools.partial(_count, read, cell, marks), shares)
  counts = functools.reduce(lambda a, b: _Counts(*map(np.add, a, b)), parts)
  counts.places[1::2] -= counts.hits
  upto = counts.places[::-1].cumsum()[::-1]
  steps = Steps(
    score[::-1],
    counts.hits[::-1],
    counts.weight[::-1],
    above + upto[2::2][::-1],
    above + upto[1::2][::-1],
  )
  if cell.single and not counts.hits[0]:
    steps = Steps(*(field[:0] for field in steps))
  return steps, int(upto[0])
