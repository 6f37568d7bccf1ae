"""The benchmark's own parts; what it measures is not asserted."""

import numpy as np
import pytest

from dmdd_jax import benchmark
from dmdd_jax import benchmark_suites
from dmdd_jax.metrics import region


def test_the_threshold_loop_is_near_the_exact_au_pro():
  maps, masks = benchmark_suites.fake_test_set(8, 64)
  exact = region.au_pro(maps, masks, limits=(0.3,))[0]
  assert benchmark_suites.pro_200_thresholds(maps, masks) == pytest.approx(
    exact, abs=0.02
  )


def test_the_numpy_pair_differs_inside_its_mask_alone():
  rng = np.random.default_rng(3)
  image, texture = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
  found = [
    benchmark_suites.numpy_pair(
      image, texture[None], np.random.default_rng(seed)
    )
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
  assert 0 <= found.lowest <= found.median <= found.highest


def test_more_is_better_of_a_rate_and_less_of_all_else():
  fast = benchmark.Figure('a', 'images/s', 10.0, baseline=4.0, limit=20.0)
  assert fast.over(fast.baseline) == 2.5 and fast.over(fast.limit) == 0.5
  short = benchmark.Figure('b', 's', 2.0, 1.5, 3.0, 8.0, 'the loop')
  assert short.over(short.baseline) == 4.0
  table = benchmark.format_table([fast, short])
  assert '| b | 2 s (1.5 to 3) | 8, the loop: **4.00x** |  |' in table


def test_a_rate_is_of_the_median():
  seconds = benchmark.Seconds(2.0, 1.0, 4.0, 0.0)
  found = benchmark.rate('a', 'pairs/s', 8, seconds)
  assert (found.value, found.low, found.high) == (4.0, 2.0, 8.0)


def test_an_unknown_suite_lists_the_known_ones():
  with pytest.raises(ValueError, match='metrics'):
    benchmark_suites.run('everything', benchmark_suites.Options())
