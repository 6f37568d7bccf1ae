"""Faults planted in a category, each found once and by its file's name."""

import os
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import synthesis_helpers

from dmdd_jax.data import check
from dmdd_jax.data import layouts

DATA = os.environ.get('DMDD_TEST_DATA')
needs_data = pytest.mark.skipif(
  not DATA, reason='DMDD_TEST_DATA, the folder of real images, is not set'
)
TOOL = os.path.join(os.path.dirname(__file__), '../tools/check_data.py')


def _save(path, seed=0, size=(16, 12), kind='RGB'):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  channels = (3,) if kind == 'RGB' else ()
  pixels = rng.integers(0, 256, (*size[::-1], *channels), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


def _save_mask(path, pixels=20, size=(16, 12)):
  path.parent.mkdir(parents=True, exist_ok=True)
  mask = np.zeros(size[0] * size[1], np.uint8)
  mask[:pixels] = 255
  Image.fromarray(mask.reshape(size[::-1])).save(path)
  return path


@pytest.fixture
def nut(tmp_path):
  """A faultless category of 4 train, 2 good and 3 defective images."""
  nut = tmp_path / 'ein Satz' / 'nut'
  for i in range(4):
    _save(nut / f'train/good/{i}.png', seed=i)
  for i in range(2):
    _save(nut / f'test/good/{i}.png', seed=10 + i)
  for i in range(3):
    _save(nut / f'test/dent/{i}.png', seed=20 + i)
    _save_mask(nut / f'ground_truth/dent/{i}_mask.png')
  return nut


def _check(nut):
  return check.check_category(nut.parent, nut.name)


def test_a_faultless_category(nut):
  report = _check(nut)
  assert report.faults == ()
  assert report.counts == {'train/good': 4, 'test/dent': 3, 'test/good': 2}
  assert report.sizes == {(16, 12): 9}
  assert report.areas == pytest.approx([20 / 192] * 3)
  text = check.format_report(report)
  assert 'test/dent: 3 images' in text and '16x12 (9)' in text
  assert text.endswith('0 faults')


def _truncate(nut):
  path = nut / 'train/good/1.png'
  path.write_bytes(path.read_bytes()[:-80])
  return [(path, 'cannot be decoded')]


def _text(nut):
  path = nut / 'ground_truth/dent/0_mask.png'
  path.write_text('no image')
  return [(path, 'not an image')]


def _lose_mask(nut):
  (nut / 'ground_truth/dent/1_mask.png').unlink()
  return [(nut / 'test/dent/1.png', 'no mask')]


def _lose_image(nut):
  (nut / 'test/dent/2.png').unlink()
  return [(nut / 'ground_truth/dent/2_mask.png', 'no image')]


def _resize(nut):
  path = _save_mask(nut / 'ground_truth/dent/1_mask.png', size=(12, 16))
  return [(path, 'the mask is 12x16, its image 16x12')]


def _empty(nut):
  first = _save_mask(nut / 'ground_truth/dent/0_mask.png', pixels=0)
  second = _save_mask(nut / 'ground_truth/dent/1_mask.png', pixels=3)
  return [(first, 'empty (0 pixels)'), (second, 'nearly empty (3 pixels)')]


def _copy(nut):
  """The same pixels in another format, so in other bytes."""
  image = Image.open(nut / 'train/good/2.png')
  image.save(nut / 'test/good/copy.bmp')
  return [(nut / 'test/good/copy.bmp', 'train/good/2.png, pixel by pixel')]


def _mislabel(nut):
  (nut / 'test/good/x.png').write_bytes((nut / 'test/dent/0.png').read_bytes())
  return [(nut / 'test/good/x.png', 'test/dent/0.png')]


def _hide(nut):
  _save(nut / 'train/bad/0.png', seed=77)
  return [(nut / 'train/bad', 'nothing reads')]


def _misplace(nut):
  first = _save(nut / 'test/5.png', seed=78)
  _save(nut / 'test/dent/more/6.png', seed=79)
  second = _save_mask(nut / 'ground_truth/7_mask.png')
  return [
    (first, 'nothing reads this file'),
    (nut / 'test/dent/more', 'nothing reads this folder'),
    (second, 'nothing reads this file'),
  ]


def _empty_folder(nut):
  (nut / 'test/hole').mkdir()
  return [(nut / 'test/hole', 'no image in it')]


def _no_train(nut):
  (nut / 'train/good').rename(nut / 'train/fine')
  return [
    (nut / 'train/good', 'no folder'),
    (nut / 'train/fine', 'nothing reads'),
  ]


_PLANTS = [
  _truncate,
  _text,
  _lose_mask,
  _lose_image,
  _resize,
  _empty,
  _copy,
  _mislabel,
  _hide,
  _misplace,
  _empty_folder,
  _no_train,
]


@pytest.mark.parametrize('plant', _PLANTS)
def test_a_planted_fault_is_found_and_nothing_else(nut, plant):
  expected = plant(nut)
  faults = _check(nut).faults
  assert len(faults) == len(expected)
  for path, text in expected:
    (line,) = [f for f in faults if f.startswith(f'{path}:')]
    assert text in line and '\n' not in line


def test_all_faults_are_found_at_once(nut):
  planted = [_truncate, _lose_mask, _lose_image, _empty_folder, _hide]
  expected = sum((plant(nut) for plant in planted), [])
  assert len(_check(nut).faults) == len(expected)


def test_repeated_images_of_one_folder_are_counted(nut):
  path = nut / 'train/good/3.png'
  path.write_bytes((nut / 'train/good/0.png').read_bytes())
  report = _check(nut)
  assert report.repeated == 1 and not report.faults


def test_files_that_are_no_images_are_said_and_no_fault(nut):
  (nut / 'train/good/notes.doc').write_text('x')
  report = _check(nut)
  assert not report.faults
  assert '1 files are no images' in check.format_report(report)
  assert 'notes.doc' in check.format_report(report)


def test_images_of_a_format_that_is_not_read_are_faults(nut):
  (nut / 'train/good/photo.heic').write_text('x')
  (fault,) = _check(nut).faults
  assert 'photo.heic: .heic is not read' in fault


def test_no_such_category_names_those_there(nut):
  with pytest.raises(FileNotFoundError, match='holds nut'):
    check.check_category(nut.parent, 'bolt')


def test_the_sheet_shows_normal_anomalous_and_mask(nut, tmp_path):
  _truncate(nut)  # The sheet is of what is left.
  _lose_mask(nut)
  path = tmp_path / 'out' / 'sheet.png'
  options = synthesis_helpers.perlin_options(region_share=1.0)
  check.write_sheet(str(path), nut.parent, 'nut', options, count=5)
  sheet = np.asarray(Image.open(path))
  assert sheet.shape == (3 * 36, 2 * 100, 3)
  normal, anomalous, mask = (sheet[:32, i : i + 32] for i in (0, 32, 64))
  assert set(np.unique(mask)) <= {0, 255} and mask.any()
  changed = np.abs(np.int32(normal) - anomalous).max(axis=-1)
  assert not changed[mask[..., 0] == 0].any()
  assert changed[mask[..., 0] == 255].min() > 0


@pytest.mark.parametrize('broken', [False, True])
def test_the_program_fails_exactly_where_there_are_faults(nut, broken):
  names = [str(path) for path, _ in _truncate(nut)] if broken else []
  done = subprocess.run(
    [sys.executable, TOOL, '--root', str(nut.parent), '--category', 'nut'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == int(broken), done.stderr
  assert all(name in done.stdout for name in names)
  assert f'{len(names)} faults' in done.stdout


@needs_data
@pytest.mark.parametrize('category', ['screw', 'toothbrush'])
def test_the_real_categories_are_faultless(category):
  report = check.check_category(os.path.join(DATA, 'mvtec'), category)
  assert report.faults == ()
  assert report.sizes == {(256, 256): sum(report.counts.values())}


def _ellipse(side=64):
  """A mask with a soft edge."""
  y, x = np.mgrid[:side, :side] - side / 2
  return np.clip((20 - np.hypot(x, y)) * 32 + 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize('kind', ['soft edges', 'inverted'])
def test_a_doubtful_mask_is_a_fault(nut, kind):
  soft = _ellipse()
  mask = soft if kind == 'soft edges' else 255 * (soft < 128)
  _save(nut / 'test/dent/9.png', 9, (64, 64))
  path = nut / 'ground_truth/dent/9_mask.png'
  Image.fromarray(mask.astype(np.uint8)).save(path)
  (fault,) = _check(nut).faults
  assert kind in fault and str(path) in fault


def test_masks_of_good_images_are_faults_where_they_show_a_defect(
  nut, warnings
):
  _save(nut / 'test/good/8.png', 8)
  _save(nut / 'test/good/9.png', 9)
  truth = nut / 'ground_truth/good'
  truth.mkdir()
  _save_mask(truth / '8_mask.png', 0)
  assert not _check(nut).faults
  layouts.list_mvtec(nut.parent, nut.name)
  assert not [text for text in warnings if 'good images' in text]
  _save_mask(truth / '9_mask.png', 20)
  (fault,) = _check(nut).faults
  assert '9_mask.png' in fault and 'good image has 20 defect' in fault
  layouts.list_mvtec(nut.parent, nut.name)
  assert any('Masks of good images' in text for text in warnings)


def test_16_bit_images_of_12_bits_are_said(nut):
  values = np.random.default_rng(0).integers(0, 4000, (12, 16), np.uint16)
  Image.fromarray(values).save(nut / 'train/good/deep.png')
  report = _check(nut)
  assert 'data.white_level=4095' in check.format_report(report)
  assert not report.faults
