"""Pictures: what they show, not how they look."""

import os

import numpy as np
from PIL import Image
import program_helpers
import pytest

from dmdd_jax.data import layouts
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
    name='a',
    text='b',
  )
  last = picture.axes[2]
  assert len(last.collections) == 1
  assert ('truth' in last.get_title()) == (mask is not None)
  overlays.save(picture, str(tmp_path / 'a.png'), 'a')


def _overlay(name, size=(6, 6), shape=(6, 6)):
  return overlays.overlay(
    np.zeros((*size, 3), np.uint8),
    np.linspace(0, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape),
    None,
    pixel_threshold=0.5,
    limits=(0.0, 1.0),
    name=name,
    text='score 1.00, good',
  )


def _title(picture):
  return picture.get_suptitle()


@pytest.mark.parametrize('name', ['b$\\frac$.png', '$x^2$.png', '50%_{a}.png'])
def test_a_name_is_no_mathematics(name, tmp_path):
  picture = _overlay(name)
  assert _title(picture) == f'{name}: score 1.00, good'
  assert not picture._suptitle.get_parse_math()
  overlays.save(picture, str(tmp_path / 'a.png'), name)
  assert (tmp_path / 'a.png').stat().st_size


def test_a_name_that_no_font_has_is_outside_of_the_picture(tmp_path):
  name = '\ue123部品\udce9.png'  # Private use: in no font.
  picture = _overlay(name)
  assert _title(picture) == 'score 1.00, good'
  overlays.save(picture, str(tmp_path / 'a.png'), name)
  with Image.open(tmp_path / 'a.png') as image:
    assert image.text['Title'] == '\ue123部品\ufffd.png'


def test_another_font_shows_what_the_first_one_lacks(monkeypatch):
  letter = '\u20d2'  # Of those that matplotlib brings, STIX has it.
  picture = _overlay(f'a{letter}.png')
  assert _title(picture).startswith(f'a{letter}')
  assert 'STIXGeneral' in picture._suptitle.get_fontfamily()


def test_a_long_name_keeps_its_ends():
  title = _title(_overlay('a' + '日本' * 80 + 'z.png', size=(6, 6)))
  assert len(title) <= 120
  title = _title(_overlay('a' + 'x' * 250 + 'z.png'))
  assert len(title) <= 120
  assert title.startswith('ax') and 'z.png: score' in title and '…' in title


@pytest.mark.parametrize('size', [(20, 6000), (6000, 20), (1, 1), (3, 700)])
def test_a_long_image_is_more_than_a_line(size, tmp_path):
  picture = _overlay('a.png', size=size, shape=(16, 16))
  overlays.save(picture, str(tmp_path / 'a.png'), 'a')
  width, height = picture.get_size_inches() * 110
  for axis in picture.axes[:3]:
    box = axis.get_position()
    assert box.width * width > 50 and box.height * height > 50
    assert min(box.x0, box.y0) >= 0 and max(box.x1, box.y1) <= 1
  assert ('stretched' in picture.axes[0].get_title()) == (max(size) > 8)


def test_only_what_is_seen_is_drawn():
  image = np.zeros((1500, 2000, 3), np.uint8)
  anomaly_map = np.zeros((1500, 2000), np.float32)
  anomaly_map[700, 1303] = 5.0  # One pixel of three millions.
  picture = overlays.overlay(
    image,
    anomaly_map,
    None,
    pixel_threshold=1.0,
    limits=(0.0, 5.0),
    name='a',
    text='b',
  )
  for axis in picture.axes[:3]:
    assert max(axis.images[0].get_array().shape[:2]) <= 512
  assert picture.axes[1].images[0].get_array().max() == 5.0
  (line,) = picture.axes[2].collections
  (outline,) = line.get_paths()
  x, y = outline.vertices.mean(axis=0)
  assert abs(x - 1303) < 8 and abs(y - 700) < 8


def test_the_scale_of_many_maps_is_of_a_sample():
  maps = [np.linspace(0, 1, 2**20, dtype=np.float32).reshape(1024, 1024)] * 40
  low, high = overlays.color_range(maps, float('nan'))
  assert low == pytest.approx(0.5, abs=0.01)
  assert high == pytest.approx(0.999, abs=0.01)


def test_pictures_that_fail_are_named_and_others_are_written(tmp_path):
  root = program_helpers.write_data(tmp_path / 'data')
  records = list(layouts.list_mvtec(os.path.dirname(root), 'surface').test)
  maps = np.random.default_rng(0).random((len(records), 32, 32), np.float32)
  scores = np.arange(len(records), dtype=np.float32)
  broken = next(i for i, record in enumerate(records) if record.label)
  scores[broken] = 99.0
  os.truncate(records[broken].image, 10)
  failures = overlays.write_overlays(
    tmp_path / 'out', records, maps, scores, _calibration(0.5), 1
  )
  (name,) = failures
  assert 'defect_found' in name and records[broken].image in failures[name]
  written = os.listdir(tmp_path / 'out')
  assert len(written) == 3 and os.path.basename(name) not in written
