"""Pictures: what they show, not how they look."""

import numpy as np
import pytest

from dmdd_jax.report import overlays
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import score as score_lib


def _calibration(threshold):
  return calibration_lib.Calibration(
    score_lib.Fusion(), threshold, threshold, 1.0, 4
  )


def test_best_and_worst_of_each_label():
  scores = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.0])
  labels = np.array([1, 1, 1, 0, 0, 0])
  assert overlays.choose(scores, labels, 1) == [
    ('defect_missed', 1),
    ('defect_found', 0),
    ('good_clear', 5),
    ('good_alarming', 4),
  ]
  # No image twice, however many are asked for.
  chosen = overlays.choose(scores, labels, 9)
  assert sorted(index for _, index in chosen) == list(range(6))


def test_one_scale_holds_the_threshold():
  maps = [np.linspace(0, 1, 100).reshape(10, 10)]
  low, high = overlays.color_range(maps, pixel_threshold=7.0)
  assert low < 7.0 < high
  low, high = overlays.color_range(maps, pixel_threshold=float('nan'))
  assert 0.4 < low < 0.6 and high <= 1.0
  assert overlays.calibrated_range(_calibration(2.0)) == (0.0, 5.0)
  assert overlays.calibrated_range(_calibration(float('nan'))) == (0.0, 1.0)


def test_strips_stand_side_by_side():
  images = np.full((3, 8, 8, 3), 40, np.uint8)
  masks = np.zeros((3, 8, 8), np.uint8)
  masks[:, 2:4] = 1
  maps = np.zeros((3, 8, 8), np.float32)
  maps[:, 2:4] = 9.0
  strips = overlays.pair_strips(images, masks, maps, _calibration(1.0), 2)
  assert strips.shape == (2, 8, 24, 3) and strips.dtype == np.uint8
  np.testing.assert_array_equal(strips[:, :, :8], images[:2])
  assert (strips[:, 2:4, 8:16] == 255).all()
  assert strips[0, 3, 20].tolist() != strips[0, 6, 20].tolist()


@pytest.mark.parametrize('mask', [None, np.ones((6, 6), np.uint8)])
def test_an_overlay_outlines_the_threshold(mask, tmp_path):
  anomaly_map = np.zeros((6, 6), np.float32)
  anomaly_map[2:4, 2:4] = 3.0
  picture = overlays.overlay(
    np.zeros((6, 6, 3), np.uint8),
    anomaly_map,
    mask,
    pixel_threshold=1.0,
    limits=(0.0, 3.0),
    title='a',
  )
  last = picture.axes[2]
  assert len(last.collections) == 1
  assert ('truth' in last.get_title()) == (mask is not None)
  picture.savefig(tmp_path / 'a.png')
