"""Held-out splits of records."""

import os

import numpy as np
import pytest

from dmdd_jax.data import records


def _names(items):
  return [(r.defect, os.path.basename(r.image)) for r in items]


def _fake(count, folder='/a'):
  return [
    records.Record(f'{folder}/{i:03d}.png', None, 0, 'good')
    for i in range(count)
  ]


def test_holdout_is_a_partition_of_the_right_size():
  for count, fraction, minimum, expected in [
    (100, 0.1, 8, 10),
    (100, 0.05, 8, 8),
    (10, 0.1, 8, 5),
    (3, 0.5, 0, 1),
    (1, 0.5, 1, 0),
    (0, 0.5, 1, 0),
    (100, 0.0, 8, 0),
  ]:
    items = _fake(count)
    train, held_out = records.split_holdout(items, fraction, minimum, 3)
    assert len(held_out) == expected
    assert sorted(train + held_out, key=lambda r: r.image) == items


def test_holdout_depends_on_names_and_seed_alone():
  items = _fake(40)
  train, held_out = records.split_holdout(items, 0.25, 0, 1)
  shuffled = [items[i] for i in np.random.default_rng(0).permutation(40)]
  assert records.split_holdout(shuffled, 0.25, 0, 1) == (train, held_out)
  _, moved = records.split_holdout(_fake(40, '/else/where'), 0.25, 0, 1)
  assert _names(moved) == _names(held_out)
  assert records.split_holdout(items, 0.25, 0, 2)[1] != held_out
  # A draw, not the first or last few of the list.
  indices = [items.index(r) for r in held_out]
  assert min(indices) < 20 < max(indices)


def test_holdout_refuses_bad_numbers():
  for fraction in (-0.1, 0.6, float('nan')):
    with pytest.raises(ValueError, match='fraction'):
      records.split_holdout(_fake(4), fraction, 0, 0)
  with pytest.raises(ValueError, match='minimum'):
    records.split_holdout(_fake(4), 0.1, -1, 0)


def test_the_names_of_a_mask_in_their_order():
  names = records.mask_names('7')
  assert names[0] == '7_mask' and names.index('7') < names.index('7_gt')
  assert {'7_MASK', '7_GT', '7_label', '7_segmentation'} <= set(names)
  assert len(names) == len(set(names))
