"""Anomaly maps as files, and the evaluation of somebody else's."""

import os

import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from dmdd_jax import evaluate_maps
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import maps as maps_lib
from dmdd_jax.data import records as records_lib
from dmdd_jax.metrics import results


@pytest.mark.parametrize('suffix', ['.tiff', '.npy'])
def test_a_map_survives_its_file_bit_for_bit(tmp_path, suffix):
  values = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
  path = str(tmp_path / 'test' / 'dent' / f'000{suffix}')
  maps_lib.write_map(path, values)
  assert maps_lib.find_map(path.removesuffix(suffix)) == path
  np.testing.assert_array_equal(maps_lib.read_map(path), values)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (np.zeros((4, 4), np.uint8), 'uint8'),
    (np.zeros((4, 4, 3), np.float32), r'\(4, 4, 3\)'),
    (np.full((4, 4), np.nan, np.float32), 'not finite'),
  ],
)
def test_a_map_that_lost_its_ranking_is_refused(tmp_path, values, message):
  path = str(tmp_path / 'a.npy')
  np.save(path, values)
  with pytest.raises(maps_lib.BadMapError, match=message):
    maps_lib.read_map(path)


def test_an_unreadable_or_missing_map_is_named(tmp_path):
  (tmp_path / 'a.tiff').write_text('no picture')
  with pytest.raises(maps_lib.BadMapError, match=r'a\.tiff cannot be read'):
    maps_lib.read_map(str(tmp_path / 'a.tiff'))
  with pytest.raises(maps_lib.BadMapError, match=r'b\{\.tiff'):
    maps_lib.find_map(str(tmp_path / 'b'))


def test_resize_has_half_pixel_centres():
  row = np.array([[0.0, 1.0]], np.float32)
  # Twice the width: centres at -.25, .25, .75, 1.25 of the old ones.
  np.testing.assert_allclose(
    maps_lib.resize_map(row, (1, 4)), [[0.0, 0.25, 0.75, 1.0]]
  )
  values = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
  reference = ndimage.zoom(
    values, (5 / 2, 7 / 4), order=1, mode='nearest', grid_mode=True
  )
  np.testing.assert_allclose(
    maps_lib.resize_map(values, (15, 14)), reference, atol=1e-5
  )
  np.testing.assert_array_equal(maps_lib.resize_map(values, (6, 8)), values)


def test_top_mean_is_the_mean_of_the_highest():
  values = np.arange(12.0).reshape(3, 4)
  assert maps_lib.top_mean(values, 3) == pytest.approx((9 + 10 + 11) / 3)
  assert maps_lib.top_mean(values, 1) == 11
  assert maps_lib.top_mean(values, 100) == pytest.approx(5.5)


def _tree(root) -> None:
  """Two good and two dented 8x8 test images with masks."""
  for folder in ('train/good', 'test/good', 'test/dent', 'ground_truth/dent'):
    (root / 'nut' / folder).mkdir(parents=True)
  blank = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
  blank.save(root / 'nut/train/good/000.png')
  mask = np.zeros((8, 8), np.uint8)
  mask[2:5, 3:6] = 255
  for name in ('000', '001'):
    blank.save(root / 'nut/test/good' / f'{name}.png')
    blank.save(root / 'nut/test/dent' / f'{name}.png')
    Image.fromarray(mask).save(root / 'nut/ground_truth/dent' / f'{name}.png')


def test_perfect_maps_score_one_and_a_missing_one_is_named(tmp_path):
  _tree(tmp_path / 'data')
  records = layouts.list_mvtec(str(tmp_path / 'data'), 'nut').test
  stems = maps_lib.map_paths(tmp_path / 'maps', 'nut', records)
  for stem, record in zip(stems, records):
    mask = images_lib.native_mask(record).astype(np.float32)
    maps_lib.write_map(stem + '.tiff', mask)
  rows = evaluate_maps.evaluate_maps(
    str(tmp_path / 'maps'), str(tmp_path / 'data'), score_top_pixels=1
  )
  assert set(rows) == {'nut'}
  for name in ('image_auroc', 'pixel_auroc', 'pixel_ap', 'au_pro'):
    assert rows['nut'][name] == 1.0
  assert '| nut | 100.00 |' in results.format_table(rows)
  os.remove(stem + '.tiff')
  with pytest.raises(maps_lib.BadMapError, match='every test image'):
    evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), str(tmp_path / 'data'))


def test_a_folder_without_maps_says_what_it_looked_for(tmp_path):
  _tree(tmp_path / 'data')
  (tmp_path / 'maps').mkdir()
  with pytest.raises(maps_lib.BadMapError, match='CATEGORY/test'):
    evaluate_maps.evaluate_maps(str(tmp_path / 'maps'), str(tmp_path / 'data'))
  with pytest.raises(FileNotFoundError, match='nowhere'):
    evaluate_maps.evaluate_maps('nowhere', str(tmp_path / 'data'))


def test_maps_of_equal_names_keep_their_folders_and_suffixes():
  def stems(*images):
    records = [
      records_lib.Record(f'/data/{image}', None, defect != 'good', defect)
      for defect, image in images
    ]
    paths = maps_lib.map_paths('maps', 'nut', records)
    assert len(set(paths)) == len(paths)
    return [path.removeprefix('maps/nut/test/') for path in paths]

  # As MVTec's evaluation code has it, wherever the images lie.
  assert stems(('good', 'a/b/0.png'), ('dent', 'c/0.png')) == [
    'good/0',
    'dent/0',
  ]
  assert stems(
    ('good', 'good/day1/0.png'),
    ('good', 'good/day2/0.png'),
    ('good', 'good/day2/1.png'),
    ('dent', 'bad/dent/0.png'),
    ('dent', 'bad/dent/0.jpg'),
  ) == ['good/day1/0', 'good/day2/0', 'good/day2/1'] + [
    'dent/0.png',
    'dent/0.jpg',
  ]
