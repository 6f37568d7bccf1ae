"""The benchmark's own parts; what it measures is not asserted."""

import numpy as np
from PIL import Image
import pytest

from dmdd_jax.benchmark import coverage
from dmdd_jax.benchmark import input as input_suite
from dmdd_jax.benchmark import latency
from dmdd_jax.benchmark import measure
from dmdd_jax.benchmark import metrics as metrics_suite
from dmdd_jax.benchmark import suites
from dmdd_jax.metrics import region
from dmdd_jax.serve import models as serve_models


def test_the_threshold_loop_is_near_the_exact_au_pro():
  maps, masks = metrics_suite.fake_test_set(8, 64)
  exact = region.au_pro(maps, masks, limits=(0.3,))[0]
  assert metrics_suite.pro_200_thresholds(maps, masks) == pytest.approx(
    exact, abs=0.02
  )


def test_the_numpy_pair_differs_inside_its_mask_alone():
  rng = np.random.default_rng(3)
  image, texture = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
  found = [
    input_suite.numpy_pair(image, texture[None], np.random.default_rng(seed))
    for seed in range(20)
  ]
  assert any(mask.any() for _, mask in found)
  for pair, mask in found:
    outside = np.broadcast_to(mask, pair.shape) == 0
    normal = image.astype(np.float32) / 255
    np.testing.assert_array_equal(pair[outside], normal[outside])


def test_a_measurement_counts_its_calls():
  calls = []
  found = measure.measure(lambda: calls.append(1), repeats=3, warmup=2)
  assert len(calls) == 5
  assert 0 <= found.lowest <= found.median <= found.highest


def test_more_is_better_of_a_rate_and_less_of_all_else():
  fast = measure.Figure('a', 'images/s', 10.0, baseline=4.0, limit=20.0)
  assert fast.over(fast.baseline) == 2.5 and fast.over(fast.limit) == 0.5
  short = measure.Figure('b', 's', 2.0, 1.5, 3.0, 8.0, 'the loop')
  assert short.over(short.baseline) == 4.0
  table = measure.format_table([fast, short])
  assert '| b | 2 s (1.5 to 3) | 8, the loop: **4.00x** |  |' in table


def test_a_rate_is_of_the_median():
  seconds = measure.Seconds(2.0, 1.0, 4.0, 0.0)
  found = measure.rate('a', 'pairs/s', 8, seconds)
  assert (found.value, found.low, found.high) == (4.0, 2.0, 8.0)


def test_an_unknown_suite_lists_the_known_ones():
  with pytest.raises(ValueError, match='metrics'):
    suites.run('everything', measure.Options())


def test_a_path_is_called_with_one_image_and_with_every_batch():
  images, seen = np.zeros((16, 2, 2, 3), np.uint8), []
  found = latency.measure_path(
    lambda rows: seen.append(len(rows)), images, repeats=1
  )
  assert set(seen) == {1, 4, 16} and seen.count(1) > 40
  assert 0 < found.p50 <= found.p99 and found.batch in seen


def test_a_server_is_asked_by_one_client_and_by_many(tmp_path):
  for package in ('fastapi', 'uvicorn'):
    pytest.importorskip(package, reason='the extra serve is not installed')
  Image.new('RGB', (4, 4)).save(tmp_path / 'x.png')
  seen = []

  def run(images):
    seen.append(len(images))
    return np.zeros(len(images)), np.zeros((len(images), 4, 4))

  model = serve_models.Model('nut', 4, 8, 0.5, 0.5, run, 'test')
  path = str(tmp_path / 'x.png')
  found = latency.measure_server(model, path, repeats=1)
  assert sum(seen) == 8 + 40 + 4 * (1 + 4 + 16)
  assert 0 < found.p50 <= found.p99 and found.batch in (1, 4, 16)


def test_what_is_not_installed_stands_in_the_table():
  table = measure.format_table([latency.missing('server', 'serve')])
  assert '| server: the extra serve is not installed | not measured |' in table


def test_delongs_interval_by_hand():
  scores, labels = np.array([1.0, 2, 3, 2.5, 4, 5]), np.repeat([0, 1], 3)
  # Won by defects: 2/3, 1, 1; over good images: 1, 1, 2/3.
  half = 1.959964 * np.sqrt(2 * np.var([2 / 3, 1, 1], ddof=1) / 3)
  low, high = coverage.delong(scores, labels)
  assert low == pytest.approx(8 / 9 - half)
  assert high == 1.0


def test_the_coverage_suite_counts_what_holds(monkeypatch):
  monkeypatch.setattr(coverage, '_SETS', {'scores': 20, 'maps': 3})
  monkeypatch.setattr(coverage, '_LARGE', 400)
  monkeypatch.setattr(coverage, 'SIZES', ((8, 12),))
  rows = coverage.run(measure.Options(repeats=1))
  assert {row.metric for row in rows} >= {'image_auroc', 'au_pro'}
  for row in rows:
    assert 0 < row.truth <= 1
    assert all(0 <= share <= 1 for share in row.covered.values())
    assert all(0 <= width < 1 for width in row.width.values())
  table = coverage.format_table(rows)
  assert '| image_ap |' in table and '| 8 + 12 |' in table
