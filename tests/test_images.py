"""Checking and reading images and masks, right ones and broken ones."""

import os
import struct
import zlib

import cv2
import layout_helpers
import numpy as np
from PIL import Image
import pytest

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import records


@pytest.fixture
def root(tmp_path):
  return layout_helpers.mvtec(tmp_path / 'data')


def _names(items):
  return [(r.defect, os.path.basename(r.image)) for r in items]


# Checking.


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-60])


def _text(path):
  path.write_text('this is not an image')


def _empty(path):
  path.write_bytes(b'')


def _flip(path):
  """Damages the compressed pixels and leaves header and length as they are."""
  content = bytearray(path.read_bytes())
  start = content.index(b'IDAT') + 20
  content[start : start + 40] = bytes(255 - b for b in content[start:][:40])
  path.write_bytes(content)


@pytest.mark.parametrize('damage', [_truncate, _text, _empty, _flip])
@pytest.mark.parametrize(
  'name', ['test/scratch/001.png', 'ground_truth/scratch/001_mask.png']
)
def test_broken_files(root, warnings, damage, name):
  path = root / 'nut' / name
  layout_helpers.save(
    path, layout_helpers.picture(12, 16, 0)
  )  # Noise: too long to lose only its end mark.
  damage(path)
  test = layouts.list_mvtec(root, 'nut').test
  with pytest.raises(ValueError) as error:
    images_lib.validate(test)
  assert isinstance(error.value, files.BadImageError)
  assert str(error.value).startswith(f'{path}: ')
  assert '--config.data.on_bad_image=skip' in str(error.value)
  assert not warnings
  assert images_lib.validate(test, 'skip') == test[:-1]
  assert str(path) in warnings[0]
  assert warnings[1] == 'Skipped 1 of 5 images.'


def test_truncated_jpeg(tmp_path):
  path = layout_helpers.save(tmp_path / 'a.jpg', layout_helpers.picture(64, 64))
  path.write_bytes(path.read_bytes()[:-500])
  with pytest.raises(files.BadImageError, match='truncated'):
    images_lib.read_image(path, 32)


def test_all_bad_files_are_named(root):
  for i in (1, 3):
    _text(root / f'nut/train/good/{i:03d}.png')
  train = layouts.list_mvtec(root, 'nut').train
  with pytest.raises(files.BadImageError) as error:
    images_lib.validate(train)
  assert str(error.value).startswith(train[1].image)
  assert f'And 1 more: {train[3].image}' in str(error.value)


def test_mask_of_another_size(root, warnings):
  path = layout_helpers.save(
    root / 'nut/ground_truth/dent/000.bmp', layout_helpers.mask(16, 12)
  )
  test = layouts.list_mvtec(root, 'nut').test
  with pytest.raises(files.BadImageError) as error:
    images_lib.validate(test)
  assert str(path) in str(error.value) and test[0].image in str(error.value)
  assert 'mask is 12x16' in str(error.value) and 'is 16x12' in str(error.value)
  assert images_lib.validate(test, 'skip') == test[1:]
  assert len(warnings) == 2


def test_empty_mask_of_a_defect_is_kept(root, warnings):
  layout_helpers.save(
    root / 'nut/ground_truth/dent/000.bmp', 0 * layout_helpers.mask()
  )
  test = layouts.list_mvtec(root, 'nut').test
  assert images_lib.validate(test) == test
  assert 'all zero' in warnings[0]


def test_nothing_left_is_an_error_under_skip(root):
  for path in (root / 'nut/train/good').iterdir():
    _text(path)
  train = layouts.list_mvtec(root, 'nut').train
  with pytest.raises(files.BadImageError, match='All 4 images'):
    images_lib.validate(train, 'skip')


def test_validate_keeps_good_records_and_their_order(root):
  test = layouts.list_mvtec(root, 'nut').test[::-1]
  for threads in (0, 1, 7):
    assert images_lib.validate(iter(test), 'skip', threads) == test
  assert images_lib.validate(()) == ()


def test_unknown_on_bad():
  with pytest.raises(ValueError, match="'ignore', expected 'error' or 'skip'"):
    images_lib.validate((), 'ignore')


# Reading.


def test_same_size_is_read_unchanged(tmp_path):
  array = layout_helpers.picture(16, 16)
  path = layout_helpers.save(tmp_path / 'a.png', array)
  image = images_lib.read_image(path, 16)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, array)
  np.testing.assert_array_equal(images_lib.read_image(path, None), array)


def test_resizing_averages(tmp_path):
  """A fine checkerboard becomes grey; sampling would leave black and white."""
  board = np.indices((64, 64)).sum(axis=0) % 2 * 255
  path = layout_helpers.save(tmp_path / 'a.png', board.astype(np.uint8))
  image = images_lib.read_image(path, 16)
  assert image.shape == (16, 16, 3)
  np.testing.assert_allclose(image[1:-1, 1:-1], 127.5, atol=4)


@pytest.mark.parametrize(
  ('orientation', 'turn'),
  [
    (1, lambda a: a),
    (3, lambda a: a[::-1, ::-1]),
    (6, lambda a: np.rot90(a, -1)),
    (8, np.rot90),
    (5, lambda a: a.swapaxes(0, 1)),
  ],
)
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_exif_orientation(tmp_path, orientation, turn, suffix):
  array = layout_helpers.picture(6, 10)
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = layout_helpers.save(tmp_path / f'a.{suffix}', array, exif=exif)
  np.testing.assert_array_equal(images_lib.read_image(path, None), turn(array))
  mask = images_lib.read_mask(path, None)
  np.testing.assert_array_equal(
    mask[..., 0], turn(array).max(axis=-1).clip(max=1)
  )


def test_a_turned_photo_fits_its_upright_mask(root):
  """Its pixels are stored 12 high, 16 wide, but shown 16 high, 12 wide."""
  exif = Image.Exif()
  exif[0x0112] = 6
  layout_helpers.save(
    root / 'nut/test/dent/000.PNG', layout_helpers.picture(12, 16), exif=exif
  )
  layout_helpers.save(
    root / 'nut/ground_truth/dent/000.bmp', layout_helpers.mask(16, 12)
  )
  test = layouts.list_mvtec(root, 'nut').test
  assert images_lib.validate(test) == test


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_grey_is_scaled_from_its_full_range(tmp_path, suffix):
  values = np.array([[0, 1, 257, 32768], [255 * 128, 65278, 65534, 65535]])
  path = layout_helpers.save(tmp_path / f'a.{suffix}', values.astype(np.uint16))
  image = images_lib.read_image(path, None)
  expected = np.rint(values / 65535 * 255)
  np.testing.assert_array_equal(image, np.stack([expected] * 3, axis=-1))
  # As a mask even the faintest grey counts.
  mask = images_lib.read_mask(path, None)
  np.testing.assert_array_equal(mask[..., 0], values > 0)


def test_32_bit_floats_are_refused(tmp_path):
  path = layout_helpers.save(
    tmp_path / 'a.tif', np.full((4, 4), 0.5, np.float32)
  )
  with pytest.raises(files.BadImageError, match='expected 8 or 16 bits'):
    images_lib.read_image(path, 4)
  with pytest.raises(files.BadImageError):
    images_lib.validate([records.Record(str(path), None, 0, 'good')])


def test_grey_and_bilevel(tmp_path):
  grey = layout_helpers.picture(5, 7, 0)
  path = layout_helpers.save(tmp_path / 'grey.png', grey)
  np.testing.assert_array_equal(
    images_lib.read_image(path, None), np.stack([grey] * 3, axis=-1)
  )
  path = layout_helpers.save(tmp_path / 'bits.png', grey > 127)
  np.testing.assert_array_equal(
    images_lib.read_image(path, None)[..., 0], (grey > 127) * 255
  )


def test_palette(tmp_path):
  colours = np.array([[0, 0, 0], [200, 10, 30], [0, 0, 90]], np.uint8)
  indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
  image = Image.fromarray(indices)
  image.putpalette(colours.tobytes())
  assert image.mode == 'P'
  image.save(tmp_path / 'a.png')
  read = images_lib.read_image(tmp_path / 'a.png', None)
  np.testing.assert_array_equal(read, colours[indices])
  mask = images_lib.read_mask(tmp_path / 'a.png', None)
  np.testing.assert_array_equal(mask[..., 0], indices > 0)


def test_transparent_pixels_are_black(tmp_path):
  rgba = np.full((1, 3, 4), 200, np.uint8)
  rgba[0, :, 3] = (0, 128, 255)
  path = layout_helpers.save(tmp_path / 'a.png', rgba)
  read = images_lib.read_image(path, None)
  np.testing.assert_array_equal(read[0, :, 0], (0, 100, 200))
  mask = images_lib.read_mask(path, None)
  np.testing.assert_array_equal(mask[0, :, 0], (0, 1, 1))
  grey = Image.fromarray(np.full((1, 1), 80, np.uint8))
  grey.putalpha(0)
  grey.save(tmp_path / 'la.png')
  assert not images_lib.read_image(tmp_path / 'la.png', None).any()


def test_cmyk(tmp_path):
  white = Image.new('CMYK', (4, 4), (0, 0, 0, 0))
  white.save(tmp_path / 'a.jpg')
  assert images_lib.read_image(tmp_path / 'a.jpg', 4).min() >= 254


def _deep_png(path, rows, kind):
  """A 16-bit PNG of PNG's colour type `kind`, which Pillow does not write."""
  rows = rows.reshape(len(rows), -1).astype('>u2')
  channels = {2: 3, 4: 2}[kind]
  shape = (rows.shape[1] // channels, len(rows))
  header = struct.pack('>IIBBBBB', *shape, 16, kind, 0, 0, 0)
  data = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
  content = b'\x89PNG\r\n\x1a\n'
  for name, part in ((b'IHDR', header), (b'IDAT', data), (b'IEND', b'')):
    check = zlib.crc32(name + part)
    content += struct.pack('>I', len(part)) + name + part
    content += struct.pack('>I', check)
  path.write_bytes(content)


def test_less_common_kinds_show_the_same_picture(tmp_path):
  """Colours that hardly change under JPEG; of several frames the first."""
  red = np.tile(np.linspace(0, 252, 24).astype(np.uint8), (12, 1))
  rgb = np.stack([red, red[:, ::-1], 0 * red], axis=-1)
  grey = np.stack([red] * 3, axis=-1)
  opaque = np.dstack([rgb, np.full_like(red, 255)])
  exif = Image.Exif()
  exif[0x0112] = 6
  frames = [Image.fromarray(rgb[::-1, ::-1])]
  palette = Image.fromarray(rgb).convert('P', palette=Image.Palette.ADAPTIVE)
  for suffix in ('bmp', 'tif'):
    palette.save(tmp_path / f'palette.{suffix}')
  for suffix in ('webp', 'tif'):
    options = {'lossless': True} if suffix == 'webp' else {}
    layout_helpers.save(tmp_path / f'alpha.{suffix}', opaque, **options)
    options |= {'save_all': True, 'append_images': frames}
    layout_helpers.save(tmp_path / f'frames.{suffix}', rgb, **options)
  for suffix in ('jpg', 'webp'):
    options = {'exif': exif, 'quality': 98, 'lossless': True}
    layout_helpers.save(tmp_path / f'turned.{suffix}', np.rot90(rgb), **options)
  layout_helpers.save(tmp_path / 'lzw.tif', rgb, compression='tiff_lzw')
  deep = rgb.astype(np.uint16) * 257
  cv2.imwrite(str(tmp_path / 'deep_rgb.tif'), deep[..., ::-1])
  _deep_png(tmp_path / 'deep_rgb.png', deep, 2)
  full = np.full_like(deep[..., 0], 65535)
  _deep_png(tmp_path / 'grey_alpha.png', np.dstack([deep[..., 0], full]), 4)
  layout_helpers.save(
    tmp_path / 'grey_big_endian.tif', deep[..., 0].astype('>u2')
  )
  layout_helpers.save(tmp_path / 'grey.jpg', red, quality=98)
  assert Image.open(tmp_path / 'grey_big_endian.tif').mode == 'I;16B'
  for path in sorted(tmp_path.iterdir()):
    image = images_lib.read_image(path, None)
    expected = grey if path.name.startswith('grey') else rgb
    assert image.shape == expected.shape, path
    assert np.abs(np.int32(image) - expected).max() <= 10, path


def test_mask_values_and_sizes(tmp_path):
  array = np.zeros((8, 8), np.uint8)
  array[0:4, 0:4] = 1
  array[4:8, 4:8] = 255
  path = layout_helpers.save(tmp_path / 'a.png', array)
  expected = np.array([[1, 0], [0, 1]], np.uint8)
  for size in (None, 2, 4, 8, 16):
    mask = images_lib.read_mask(path, size)
    side = size or 8
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(
      mask[..., 0], np.kron(expected, np.ones((side // 2, side // 2)))
    )


def test_jpeg_mask_has_no_rim_of_noise(tmp_path):
  array = np.zeros((64, 64), np.uint8)
  array[20:41, 13:37] = 255
  path = layout_helpers.save(tmp_path / 'a.jpg', array, quality=70)
  assert np.asarray(Image.open(path))[array == 0].any()  # The noise.
  mask = images_lib.read_mask(path, None)
  np.testing.assert_array_equal(mask[..., 0], array > 0)


@pytest.mark.parametrize('read', [images_lib.read_image, images_lib.read_mask])
def test_reading_names_the_file(tmp_path, read):
  with pytest.raises(files.BadImageError, match='no such file'):
    read(tmp_path / 'gone.png', 8)
  (tmp_path / 'text.png').write_text('hello')
  with pytest.raises(files.BadImageError) as error:
    read(tmp_path / 'text.png', 8)
  assert str(tmp_path / 'text.png') in str(error.value)
  assert '5 bytes' in str(error.value)


def test_load_arrays(root):
  test = layouts.list_mvtec(root, 'nut').test
  images, masks = images_lib.load_arrays(test, 8, num_threads=3)
  assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
  assert masks.shape == (5, 8, 8, 1) and masks.dtype == np.uint8
  for i, record in enumerate(test):
    np.testing.assert_array_equal(
      images[i], images_lib.read_image(record.image, 8)
    )
    assert masks[i].any() == bool(record.label)
  images, masks = images_lib.load_arrays((), 8)
  assert images.shape == (0, 8, 8, 3) and masks.shape == (0, 8, 8, 1)
  _text(root / 'nut/test/dent/000.PNG')
  with pytest.raises(files.BadImageError, match='000.PNG'):
    images_lib.load_arrays(test, 8)


def test_an_image_of_too_many_pixels_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setattr(images_lib, '_allowed', 100)
  path = layout_helpers.save(tmp_path / 'line.png', layout_helpers.picture())
  with pytest.raises(images_lib.ImageTooLargeError) as caught:
    images_lib.read_image(path, None)
  for text in (str(path), '16 x 12', 'data.max_pixels', 'data.tile_size'):
    assert text in str(caught.value)
  images_lib.allow_pixels(16 * 12)
  images_lib.allow_pixels(1)  # It never allows fewer.
  assert images_lib.read_image(path, None).shape == (12, 16, 3)


def test_more_pixels_than_pillow_reads_by_itself(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
  monkeypatch.setattr(images_lib, '_allowed', 100)
  path = layout_helpers.save(tmp_path / 'line.png', layout_helpers.picture())
  with pytest.raises(images_lib.ImageTooLargeError, match=r'data\.max_pixels'):
    images_lib.read_image(path, None)
  images_lib.allow_pixels(200)
  assert images_lib.read_image(path, None).shape == (12, 16, 3)
  content = path.read_bytes()
  assert images_lib.decode_image(content, 192).shape == (12, 16, 3)
  with pytest.raises(images_lib.ImageTooLargeError) as caught:
    images_lib.decode_image(content, 191)
  assert 'config.data' not in str(caught.value)  # A server's client has none.


def _signed(path, values):
  """A TIFF of signed 16-bit pixels, which Pillow does not write."""
  image = Image.fromarray(np.asarray(values, np.int16).view(np.uint16))
  image.save(path, tiffinfo={339: 2})
  return path


def test_signed_16_bit_tiff(tmp_path):
  path = _signed(tmp_path / 'a.tif', [[0, 1000, 16384, 32767]])
  image = images_lib.read_image(path, None)
  np.testing.assert_array_equal(image[0, :, 0], [0, 8, 128, 255])
  path = _signed(tmp_path / 'b.tif', [[0, -5]])
  with pytest.raises(files.BadImageError) as caught:
    images_lib.read_image(path, None)
  assert 'signed 16-bit' in str(caught.value) and '-5' in str(caught.value)
  assert '32' not in str(caught.value).rpartition('/')[2]


def test_a_white_level_scales_16_bits_alone(tmp_path):
  values = np.array([[0, 2048, 4095, 5000]], np.uint16)
  path = layout_helpers.save(tmp_path / 'a.png', values)
  image = images_lib.read_image(path, None, 4095)
  np.testing.assert_array_equal(image[0, :, 0], [0, 128, 255, 255])
  loaded, _ = images_lib.load_arrays(
    [records.Record(str(path), None, 0, 'good')], 1, white_level=4095
  )
  assert loaded.max() > 100
  colour = layout_helpers.save(tmp_path / 'b.png', layout_helpers.picture())
  np.testing.assert_array_equal(
    images_lib.read_image(colour, None, 4095),
    images_lib.read_image(colour, None),
  )


@pytest.mark.parametrize('highest, level', [(900, 1023), (3900, 4095)])
def test_narrow_16_bit_images_are_warned_of(tmp_path, warnings, highest, level):
  found = []
  for i in range(3):
    values = np.full((4, 4), highest - i, np.uint16)
    path = layout_helpers.save(tmp_path / f'{i}.png', values)
    found.append(records.Record(str(path), None, 0, 'good'))
  images_lib.validate(found)
  assert len(warnings) == 1
  assert f'--config.data.white_level={level}' in warnings[0]
  images_lib.validate(found, white_level=level)
  assert len(warnings) == 1
  images_lib.validate(found, white_level=100)
  assert f'the highest {highest}' in warnings[1]


def test_wide_16_bit_images_are_not(tmp_path, warnings):
  values = np.array([[0, 40000]], np.uint16)
  path = layout_helpers.save(tmp_path / 'a.png', values)
  images_lib.validate([records.Record(str(path), None, 0, 'good')])
  assert not warnings


def _soft_mask(side=64):
  """A disc with an edge of some pixels."""
  y, x = np.mgrid[:side, :side] - side / 2
  return np.clip((20 - np.hypot(x, y)) * 32 + 128, 0, 255).astype(np.uint8)


def test_doubtful_masks_are_warned_of_and_kept(tmp_path, warnings):
  image = layout_helpers.save(
    tmp_path / 'a.png', layout_helpers.picture(64, 64)
  )
  soft, hard = _soft_mask(), 255 * (_soft_mask() > 127)
  inverted = 255 - hard
  kinds = np.zeros((64, 64), np.uint8)
  kinds[8:16] = np.arange(64) // 8  # Numbers of kinds, as VisA has.
  for name, mask, text in (
    ('soft', soft, f'{np.count_nonzero(soft)} pixels'),
    ('inverted', inverted, 'may be inverted'),
    ('hard', hard, None),
    ('kinds', kinds, None),
  ):
    path = layout_helpers.save(tmp_path / f'{name}.png', mask.astype(np.uint8))
    record = records.Record(str(image), str(path), 1, 'scratch')
    warnings.clear()
    assert images_lib.validate([record]) == (record,)
    assert len(warnings) == (text is not None), name
    assert text is None or (text in warnings[0] and str(path) in warnings[0])
