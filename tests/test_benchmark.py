"""The benchmark's own parts; what it measures is not asserted."""

import numpy as np
import pytest

from dmdd_jax import benchmark
from dmdd_jax.metrics import region


def test_the_threshold_loop_is_near_the_exact_au_pro():
  maps, masks = benchmark.fake_test_set(8, 64)
  exact = region.au_pro(maps, masks, limits=(0.3,))[0]
  assert benchmark.pro_200_thresholds(maps, masks) == pytest.approx(
    exact, abs=0.02
  )


def test_the_numpy_pair_differs_inside_its_mask_alone():
  rng = np.random.default_rng(3)
  image, texture = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
  found = [
    benchmark.numpy_pair(image, texture[None], np.random.default_rng(seed))
    for seed in range(20)
  ]
  assert any(mask.any() for _, mask in found)
  for pair, mask in found:
    outside = np.broadcast_to(mask, pair.shape) == 0
    normal = image.astype(np.float32) / 255
    np.testing.assert_array_equal(pair[outside], normal[outside])


def test_a_measurement_counts_its_calls():
  calls = []
  found = benchmark.measure(lambda: calls.append(1), repeats=3, warmup=2)
  assert len(calls) == 5
  assert found['repeats'] == 3
  assert found['min_s'] <= found['median_s'] <= found['max_s']


def test_an_unknown_suite_lists_the_known_ones():
  with pytest.raises(ValueError, match='metrics'):
    benchmark.run('everything')
