"""Lists of images and arrays become folders."""

import os

import numpy as np
from PIL import Image
import pytest

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import inputs


def _picture(value=0, shape=(6, 8, 3)):
  return np.full(shape, value, np.uint8)


@pytest.fixture
def tree(tmp_path):
  """a/1.png, a/2.png, b/1.png."""
  for index, name in enumerate(('a/1.png', 'a/2.png', 'b/1.png')):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(_picture(index)).save(tmp_path / name)
  return tmp_path


def test_links_keep_names_and_folders_and_the_lists_order(tree):
  names = ['b/1.png', 'a/1.png']
  paths = inputs.keep([tree / name for name in names], tree / 'kept/normal')
  assert paths == [str(tree / 'kept/normal' / name) for name in names]
  assert [os.readlink(path) for path in paths] == [str(tree / n) for n in names]
  alone = inputs.keep([str(tree / 'a/2.png')], tree / 'kept/one')
  assert alone == [str(tree / 'kept/one/2.png')]


def test_arrays_are_kept_as_they_are(tmp_path):
  rng = np.random.default_rng(0)
  arrays = [
    rng.integers(0, 256, shape, np.uint8) for shape in ((5, 4, 3), (3, 7))
  ]
  paths = inputs.keep(arrays, tmp_path / 'kept')
  assert paths == sorted(paths)
  for path, array in zip(paths, arrays):
    pixels = images_lib.read_image(path, None)
    expected = array if array.ndim == 3 else np.stack([array] * 3, -1)
    np.testing.assert_array_equal(pixels, expected)


def test_the_same_list_again_leaves_the_folder(tree):
  images = [_picture(3), tree / 'a/1.png']
  paths = inputs.keep(images, tree / 'kept')
  before = [os.lstat(path).st_mtime_ns for path in paths]
  assert inputs.keep(images, tree / 'kept') == paths
  assert [os.lstat(path).st_mtime_ns for path in paths] == before


@pytest.mark.parametrize('other', ['pixels', 'more', 'file'])
def test_another_list_is_refused_unless_it_may_replace(tree, other):
  inputs.keep([_picture(3), tree / 'a/1.png'], tree / 'kept')
  images = {
    'pixels': [_picture(4), tree / 'a/1.png'],
    'more': [_picture(3), tree / 'a/1.png', _picture(3)],
    'file': [_picture(3), tree / 'b/1.png'],
  }[other]
  with pytest.raises(files.DatasetError, match='kept holds other images'):
    inputs.keep(images, tree / 'kept')
  paths = inputs.keep(images, tree / 'kept', replace=True)
  assert sorted(files.images_below(str(tree / 'kept'))) == sorted(paths)


def test_what_is_no_image_is_named_and_nothing_is_written(tree):
  for images, error, message in (
    ([tree / 'a/9.png'], files.MissingDataError, '9.png'),
    ([tree / 'a'], files.MissingDataError, 'a folder is named by itself'),
    ([], files.MissingDataError, 'empty'),
    ([np.zeros((4, 4, 3))], files.BadImageError, 'float64'),
    ([_picture(shape=(4, 4, 4))], files.BadImageError, r'\(4, 4, 4\)'),
  ):
    with pytest.raises(error, match=message):
      inputs.keep(images, tree / 'kept')
  assert sorted(os.listdir(tree)) == ['a', 'b']


@pytest.fixture
def test_folder(tmp_path):
  """test/good/0, test/dent/{0, 1}, truth/dent/{0_mask, 1}."""
  for name in (
    *('test/good/0.png', 'test/dent/0.png', 'test/dent/1.png'),
    *('truth/dent/0_mask.png', 'truth/dent/1.png'),
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_picture()).save(tmp_path / name)
  return tmp_path


def test_a_test_folder_has_its_kinds_and_masks(test_folder):
  test, truth = test_folder / 'test', test_folder / 'truth'
  records = inputs.list_test(test, truth, test_folder / 'kept')
  assert [(r.image, r.mask, r.label, r.defect) for r in records] == [
    (f'{test}/dent/0.png', f'{truth}/dent/0_mask.png', 1, 'dent'),
    (f'{test}/dent/1.png', f'{truth}/dent/1.png', 1, 'dent'),
    (f'{test}/good/0.png', None, 0, 'good'),
  ]
  without = inputs.list_test(test, None, test_folder / 'kept')
  assert [r.mask for r in without] == [None] * 3


def test_kinds_by_name_with_arrays(test_folder):
  mask = np.zeros((6, 8), bool)
  mask[2, 3] = True
  records = inputs.list_test(
    {'good': test_folder / 'test/good', 'hole': [_picture(1)]},
    {'hole': [mask]},
    test_folder / 'kept',
  )
  assert [r.defect for r in records] == ['good', 'hole']
  np.testing.assert_array_equal(images_lib.native_mask(records[1]) > 0, mask)


def test_wrong_test_images_are_named(test_folder):
  kept = test_folder / 'kept'
  with pytest.raises(files.MissingDataError, match='holds no folders'):
    inputs.list_test(test_folder / 'test/good', None, kept)
  images = {'dent': test_folder / 'test/dent'}
  with pytest.raises(files.DatasetError, match='dent: 1 masks for 2 images'):
    inputs.list_test(images, {'dent': [_picture()]}, kept)
  with pytest.raises(files.DatasetError, match='masks of hole'):
    inputs.list_test(images, {'hole': [_picture()]}, kept)
