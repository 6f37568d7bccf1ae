"""AUROC, AP, F1-max against scikit-learn, by hand, and under block limits."""

import tracemalloc
import warnings

import hypothesis
from hypothesis import strategies as st
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from dmdd_jax.metrics import ranking

_FEW = hypothesis.settings(max_examples=60, deadline=None)


def _truth(scores, labels):
  """The four numbers from scikit-learn."""
  precision, recall, thresholds = sklearn_metrics.precision_recall_curve(
    labels, scores
  )
  f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
  best = int(np.flatnonzero(f1 > f1.max() - 1e-12)[-1])
  return (
    sklearn_metrics.roc_auc_score(labels, scores),
    sklearn_metrics.average_precision_score(labels, scores),
    f1.max(),
    thresholds[best],
  )


@st.composite
def _scores_and_labels(draw):
  """Scores with many ties and labels of both kinds."""
  labels = np.array(
    [0, 1, *draw(st.lists(st.integers(0, 1), min_size=0, max_size=60))]
  )
  levels = draw(st.integers(1, 8))
  dtype = draw(st.sampled_from([np.float32, np.float64, np.int64]))
  scores = draw(
    hnp.arrays(dtype, len(labels), elements=st.integers(-levels, levels))
  )
  return scores, labels


@_FEW
@hypothesis.given(_scores_and_labels())
def test_equals_scikit_learn_with_ties(case):
  scores, labels = case
  np.testing.assert_allclose(
    ranking.ranking(scores, labels), _truth(scores, labels), atol=1e-12
  )


def test_by_hand():
  # Descending: 1, then a tie of 1 and 0, then 0 0, then 1.
  scores = [0.9, 0.7, 0.7, 0.4, 0.3, 0.1]
  labels = [1, 1, 0, 0, 0, 1]
  result = ranking.ranking(scores, labels)
  # Of 9 pairs: 3 wins + (0.5 + 2) + 0.
  assert result.auroc == pytest.approx(5.5 / 9)
  assert result.ap == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)
  # F1 at 0.9: 2/4, at 0.7: 4/6, at 0.1: 6/9; the higher of the best two.
  assert result.f1_max == pytest.approx(2 / 3)
  assert result.f1_max_threshold == 0.7
  # The same in a block for each score.
  sums = ranking.RankingSums(3, 3)
  for counts in ((0.9, 1, 0, 0, 0), (0.7, 1, 0, 0, 1), (0.1, 1, 0, 3, 3)):
    sums.add(ranking.Steps(*map(np.atleast_1d, counts)))
  np.testing.assert_allclose(sums.result(), result, rtol=1e-14)
  assert ranking.auroc(scores, labels) == result.auroc
  assert ranking.average_precision(scores, labels) == result.ap
  assert ranking.f1_max(scores, labels) == (result.f1_max, 0.7)


def test_threshold_attains_the_f1():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 500)
  scores = (rng.normal(size=500) + labels).astype(np.float32)
  f1, threshold = ranking.f1_max(scores, labels)
  assert sklearn_metrics.f1_score(labels, scores >= threshold) == f1


def test_constant_scores_are_chance():
  result = ranking.ranking(np.ones(10), [1] * 4 + [0] * 6)
  np.testing.assert_allclose(result, (0.5, 0.4, 4 / 7, 1.0))


@pytest.mark.parametrize('labels', [[0, 0, 0], [1, 1, 1], []])
def test_one_class_is_undefined(labels):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert np.isnan(ranking.ranking(np.arange(len(labels)), labels)).all()


def test_large_equals_scikit_learn():
  # More than one chunk and one block, float32 ties included.
  rng = np.random.default_rng(1)
  labels = (rng.random(1_500_000) < 0.1).astype(np.uint8)
  scores = np.float16(rng.normal(size=labels.size) + labels)
  np.testing.assert_allclose(
    ranking.ranking(scores.astype(np.float32), labels),
    _truth(scores.astype(np.float64), labels),
    rtol=1e-12,
  )


def test_float64_scores_are_not_rounded():
  scores = np.array([1.0, 1.0 + 1e-12, 1.0 + 2e-12])
  assert ranking.auroc(scores, [0, 1, 1]) == 1


def test_monotone_transform_and_order_change_nothing():
  rng = np.random.default_rng(2)
  scores, labels = rng.integers(-9, 9, 300) / 4, rng.integers(0, 2, 300)
  expected = ranking.ranking(scores, labels)
  order = rng.permutation(300)
  moved = ranking.ranking(np.exp(scores)[order] * 7 - 3, labels[order])
  np.testing.assert_allclose(moved[:3], expected[:3], rtol=1e-13)
  assert moved[3] == np.exp(expected[3]) * 7 - 3


@_FEW
@hypothesis.given(
  hnp.arrays(np.float32, (5, 40), elements=st.integers(0, 12)),
  hnp.arrays(np.uint8, (5, 40), elements=st.integers(0, 2)),
  st.integers(1, 300),
)
def test_blocks_do_not_change_the_steps(scores, groups, block):
  """Tiny blocks, with scores that fill one alone, against a plain count."""
  weights = np.array([0.0, 0.25, 3.0])

  def read(index):
    if not groups[index].any():
      return scores[index], None, None
    hits = np.flatnonzero(groups[index])
    return scores[index], hits, weights[groups[index][hits]]

  blocks = list(ranking.steps(read, [40] * 5, block))
  marks = np.unique(scores[groups > 0])[::-1]
  if not len(marks):
    assert not blocks
    return
  found = ranking.Steps(*map(np.concatenate, zip(*blocks, strict=True)))
  same, normal = scores == marks[:, None, None], groups == 0
  np.testing.assert_array_equal(found.score, marks)
  np.testing.assert_array_equal(found.hits, (same & ~normal).sum((1, 2)))
  np.testing.assert_allclose(found.weight, (same * weights[groups]).sum((1, 2)))
  above = scores > marks[:, None, None]
  np.testing.assert_array_equal(found.above, (above & normal).sum((1, 2)))
  upto = scores >= marks[:, None, None]
  np.testing.assert_array_equal(found.upto, (upto & normal).sum((1, 2)))


@pytest.mark.parametrize(
  'scores, labels, message',
  [
    ([0.1, np.nan], [0, 1], 'NaN'),
    ([0.1, np.inf], [0, 1], 'infinite'),
    ([0.1, 0.2, 0.3], [0, 1], '3 entries and labels 2'),
    ([0.1, 0.2], [0, 2], 'image 1 is 2'),
    (['a', 'b'], [0, 1], 'expected numbers'),
    ([0, 2**53 + 1], [0, 1], r'9007199254740993, beyond 2\*\*53'),
    ([0, -(2**53) - 1], [0, 1], r'beyond 2\*\*53'),
    (np.ma.masked_array([0.1, 0.2], [0, 1]), [0, 1], 'scores is a masked'),
    ([0.1, 0.2], np.ma.masked_array([0, 1], [0, 1]), 'labels is a masked'),
  ],
)
def test_bad_input_is_named(scores, labels, message):
  with pytest.raises(ValueError, match=message):
    ranking.ranking(scores, labels)


def test_pixels_need_little_memory_beyond_themselves():
  rng = np.random.default_rng(3)
  scores = rng.random(2**22, dtype=np.float32)
  labels = (rng.random(2**22) < 0.02).astype(np.uint8)
  tracemalloc.start()
  try:
    ranking.ranking(scores, labels)
    # A score and its label are five bytes.
    assert tracemalloc.get_traced_memory()[1] < 5 * scores.size
  finally:
    tracemalloc.stop()
