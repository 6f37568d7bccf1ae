"""Anomaly maps as files: what is read, where it is looked for, its size."""

import cv2
import layout_helpers
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage
import tifffile

from dmdd_jax.data import layouts
from dmdd_jax.data import maps as maps_lib
from dmdd_jax.data import records as records_lib


@pytest.mark.parametrize('suffix', ['.tiff', '.npy'])
def test_a_map_survives_its_file_bit_for_bit(tmp_path, suffix):
  values = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
  path = str(tmp_path / 'test' / 'dent' / f'000{suffix}')
  maps_lib.write_map(path, values)
  np.testing.assert_array_equal(maps_lib.read_map(path), values)


# The kinds of files that other programs write.

VALUES = np.random.default_rng(1).standard_normal((40, 50))


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64', '>f4'])
@pytest.mark.parametrize('compression', [None, 'zlib', 'lzma'])
def test_tiff_of_any_floating_point(tmp_path, dtype, compression):
  path = str(tmp_path / 'a.TIF')
  tifffile.imwrite(path, VALUES.astype(dtype), compression=compression)
  read = maps_lib.read_map(path)
  assert read.dtype in (np.float32, np.float64)
  np.testing.assert_array_equal(read, VALUES.astype(dtype))


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize(
  'compression',
  [
    cv2.IMWRITE_TIFF_COMPRESSION_LZW,
    cv2.IMWRITE_TIFF_COMPRESSION_PACKBITS,
    cv2.IMWRITE_TIFF_COMPRESSION_ADOBE_DEFLATE,
  ],
)
def test_tiff_with_a_codec_that_tifffile_lacks(tmp_path, dtype, compression):
  path = str(tmp_path / 'a.tiff')
  option = [cv2.IMWRITE_TIFF_COMPRESSION, compression]
  assert cv2.imwrite(path, VALUES.astype(dtype), option)
  np.testing.assert_array_equal(maps_lib.read_map(path), VALUES.astype(dtype))


@pytest.mark.parametrize('dtype', ['float16', 'float64', 'longdouble', '>f8'])
def test_npy_of_any_floating_point(tmp_path, dtype):
  path = str(tmp_path / 'a.npy')
  np.save(path, VALUES.astype(dtype))
  read = maps_lib.read_map(path)
  assert read.dtype in (np.float32, np.float64)
  np.testing.assert_array_equal(read, VALUES.astype(dtype).astype(float))


@pytest.mark.parametrize('shape', [(1, 40, 50), (1, 1, 40, 50), (40, 50, 1)])
def test_axes_of_length_one_are_dropped(tmp_path, shape):
  for name, write in (('a.npy', np.save), ('a.tiff', tifffile.imwrite)):
    write(str(tmp_path / name), VALUES.reshape(shape))
    np.testing.assert_array_equal(
      maps_lib.read_map(str(tmp_path / name)), VALUES
    )


def test_several_pages_are_refused_by_name(tmp_path):
  path = str(tmp_path / 'stack.tiff')
  tifffile.imwrite(path, np.zeros((5, 4, 6), np.float32))
  with pytest.raises(maps_lib.BadMapError, match=r'stack\.tiff has 5 pages'):
    maps_lib.read_map(path)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (np.zeros((4, 4), np.uint8), 'uint8'),
    (np.zeros((4, 4, 3), np.float32), r'\(4, 4, 3\)'),
    (np.full((4, 4), np.nan, np.float32), 'not finite'),
    (np.full((4, 4), np.inf, np.float16), 'not finite'),
  ],
)
@pytest.mark.parametrize('name', ['a.npy', 'a.tiff'])
def test_a_map_that_lost_its_ranking_is_refused(
  tmp_path, name, values, message
):
  path = str(tmp_path / name)
  write = np.save if name == 'a.npy' else tifffile.imwrite
  write(path, values)
  with pytest.raises(maps_lib.BadMapError, match=message):
    maps_lib.read_map(path)


@pytest.mark.parametrize('content', [b'no picture', b'', b'II*\0\xff\xff\0\0'])
@pytest.mark.parametrize('name', ['a.tiff', 'a.npy'])
def test_an_unreadable_map_is_named(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(maps_lib.BadMapError, match=f'{name} (cannot|has 0)'):
    maps_lib.read_map(str(tmp_path / name))


def test_half_precision_with_a_missing_codec_says_what_to_do(tmp_path):
  """tifffile cannot write LZW without imagecodecs: the tag is changed."""
  path = tmp_path / 'a.tiff'
  tifffile.imwrite(path, VALUES.astype(np.float16), compression='zlib')
  with tifffile.TiffFile(path, mode='r+') as file:
    file.pages.first.tags['Compression'].overwrite(5)
  with pytest.raises(maps_lib.BadMapError, match='imagecodecs.*Install it, or'):
    maps_lib.read_map(str(path))


# Sizes.


def test_a_map_of_another_size_is_refused_unless_resized():
  values = np.arange(12.0).reshape(3, 4)
  assert maps_lib.fit_map('a', values, (3, 4), False) is values
  with pytest.raises(
    maps_lib.BadMapError, match=r'a\.tiff is 3 x 4 .* 6 x 8.*--resize'
  ):
    maps_lib.fit_map('a.tiff', values, (6, 8), False)
  np.testing.assert_array_equal(
    maps_lib.fit_map('a.tiff', values, (6, 8), True),
    maps_lib.resize_map(values, (6, 8)),
  )


@pytest.mark.parametrize('size', [(4, 3), (8, 5)])
def test_a_transposed_map_is_refused_even_to_be_resized(size):
  with pytest.raises(maps_lib.BadMapError, match='transposed'):
    maps_lib.fit_map('a.tiff', np.zeros((3, 4)), size, True)


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
  resized = maps_lib.resize_map(values, (15, 14))
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, reference, atol=1e-5)
  np.testing.assert_array_equal(maps_lib.resize_map(values, (6, 8)), values)
  wide = maps_lib.resize_map(values.astype(float), (15, 14))
  assert wide.dtype == np.float64
  np.testing.assert_allclose(wide, reference, atol=1e-5)


def test_top_mean_is_the_mean_of_the_highest():
  values = np.arange(12.0).reshape(3, 4)
  assert maps_lib.top_mean(values, 3) == pytest.approx((9 + 10 + 11) / 3)
  assert maps_lib.top_mean(values, 1) == 11
  assert maps_lib.top_mean(values, 100) == pytest.approx(5.5)


# Places.


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


@pytest.fixture
def nut(tmp_path):
  """Records of 2 good, 2 scratched and 1 dented image, and a map of each."""
  data = str(layout_helpers.mvtec(tmp_path / 'data'))
  records = layouts.list_mvtec(data, 'nut').test
  maps = str(tmp_path / 'maps')
  for stem in maps_lib.map_paths(maps, 'nut', records):
    maps_lib.write_map(f'{stem}.tiff', np.zeros((12, 16)))
  return maps, data, records


def test_maps_in_the_order_of_the_images_and_those_of_none(nut):
  maps, data, records = nut
  for name in ('good/007.tiff', 'crack/000.npy', 'good/._000.tiff'):
    maps_lib.write_map(f'{maps}/nut/test/{name}', np.zeros((2, 2)))
  paths, unused = maps_lib.find_maps(maps, data, 'nut', records)
  assert paths == [
    f'{stem}.tiff' for stem in maps_lib.map_paths(maps, 'nut', records)
  ]
  assert unused == [
    f'{maps}/nut/test/{n}' for n in ('crack/000.npy', 'good/007.tiff')
  ]


def test_a_missing_map_is_named_and_counted(nut, tmp_path):
  maps, data, records = nut
  for path in (tmp_path / 'maps/nut/test/scratch').iterdir():
    path.unlink()
  with pytest.raises(
    maps_lib.BadMapError,
    match=r'2 of 5 test images .*scratch/000\{\.tiff,\.tif,\.npy\};',
  ):
    maps_lib.find_maps(maps, data, 'nut', records)


def test_two_maps_for_one_image_are_named(nut):
  maps, data, records = nut
  maps_lib.write_map(f'{maps}/nut/test/good/001.npy', np.zeros((12, 16)))
  with pytest.raises(
    maps_lib.BadMapError,
    match=r'good/001\.png has 2 maps, .*001\.npy, .*001\.tiff',
  ):
    maps_lib.find_maps(maps, data, 'nut', records)


def test_one_map_for_two_images_is_named(nut, tmp_path):
  maps, data, _ = nut
  Image.new('RGB', (16, 12)).save(tmp_path / 'data/nut/test/good/001.jpg')
  records = layouts.list_mvtec(data, 'nut').test
  with pytest.raises(maps_lib.BadMapError, match='map of two images'):
    maps_lib.find_maps(maps, data, 'nut', records)


def test_maps_behind_a_link(nut, tmp_path):
  maps, data, records = nut
  good = tmp_path / 'maps/nut/test/good'
  good.rename(tmp_path / 'elsewhere')
  good.symlink_to(tmp_path / 'elsewhere')
  paths, unused = maps_lib.find_maps(maps, data, 'nut', records)
  assert len(paths) == 5 and not unused
