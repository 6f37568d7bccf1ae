"""Places among marks against a plain count, and what is tallied by them."""

import hypothesis
from hypothesis import strategies as st
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest

from dmdd_jax.metrics import places
from dmdd_jax.metrics import region
from dmdd_jax.metrics import tallies


def _plain(values, scores):
  """The places by comparing every score with every mark."""
  below = (scores[:, None] > values).sum(1)
  return below + (scores[:, None] >= values).sum(1)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.data(), st.sampled_from([np.float32, np.float64]))
def test_places_of_any_floats_are_those_of_a_plain_count(data, dtype):
  width = np.finfo(dtype).bits
  floats = st.floats(allow_nan=False, allow_infinity=False, width=width)
  near = st.integers(-3, 3).map(lambda k: float(dtype(1) + k * dtype(2e-7)))
  numbers = hnp.arrays(
    dtype, st.integers(1, 40), elements=st.one_of(floats, near, st.just(-0.0))
  )
  values, scores = np.unique(data.draw(numbers)), data.draw(numbers)
  scores = np.append(scores, values)
  expected = _plain(values, scores)
  for table in (True, False):
    marks = places.prepare(values, table)
    np.testing.assert_array_equal(places.find(marks, scores), expected)
    np.testing.assert_array_equal(
      places.upto(marks, scores), (scores[:, None] >= values).sum(1)
    )


@pytest.mark.parametrize(
  'transform',
  [
    lambda x: x,
    lambda x: 1 - np.exp(-9 * (x + 5)),  # saturates: most in the last bits
    lambda x: np.round(x, 1),
    lambda x: 1 + 1e-9 * x,  # one float32: every score is searched for
  ],
)
def test_places_of_many_scores_are_those_of_a_search(transform):
  rng = np.random.default_rng(0)
  scores = transform(rng.normal(size=3 * places.CHUNK))
  values = np.unique(scores[:5000])
  marks = places.prepare(values)
  expected = np.searchsorted(values, scores)
  expected += np.searchsorted(values, scores, 'right')
  np.testing.assert_array_equal(places.find(marks, scores), expected)
  counts = np.zeros(2 * len(values) + 1, np.int64)
  places.count(marks, scores, counts)
  np.testing.assert_array_equal(
    counts, np.bincount(expected, minlength=len(counts))
  )


@pytest.mark.parametrize('levels', [20, None])
def test_tallies_are_plain_counts(levels):
  rng = np.random.default_rng(1)
  masks = np.zeros((6, 40, 40), np.uint8)
  masks[2, 3:9, 4:20] = masks[2, 20:, 30] = masks[4, :5, :5] = 1
  masks[5, 39, 39] = 1
  maps = rng.random(masks.shape) + masks
  if levels:
    maps = np.floor(maps * levels)
  labels = masks.any((1, 2))
  pixels = region.prepare(maps, masks)
  group, _ = tallies.groups(labels)
  found = tallies.tally_pixels(pixels, ~labels, group)
  marks = tallies._thresholds(pixels, ~labels)
  assert np.isinf(marks[-1]) == (levels is None)
  order = np.argsort(group)
  above = maps[order][..., None] >= marks
  masks = masks[order][..., None]
  np.testing.assert_array_equal(found.positives, (above & masks).sum((1, 2)))
  np.testing.assert_array_equal(found.negatives, (above > masks).sum((1, 2)))
  np.testing.assert_allclose(
    found.alarms, above.mean((1, 2)) * ~labels[order][:, None]
  )
  with np.errstate(invalid='ignore'):
    recall = (above & masks).sum((1, 2)) / masks.sum((1, 2))
  np.testing.assert_allclose(found.recall, np.nan_to_num(recall))
  inside = above[3, 3:9, 4:20].mean((0, 1)) + above[3, 20:, 30].mean(0)
  assert order[3] == 2
  np.testing.assert_allclose(found.overlap[3], inside)
  np.testing.assert_array_equal(found.regions, [0, 0, 0, 2, 1, 1])
