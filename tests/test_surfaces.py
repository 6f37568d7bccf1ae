"""The demo set: repeatable, whole or absent, its masks exact."""

import json
import os
import pathlib

import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import surfaces
from dmdd_jax.data import textures as textures_lib

SMALL = {'size': 48, 'train': 3, 'test_good': 2, 'per_defect': 2}
ALL = surfaces.ORDINARY + surfaces.HELD_OUT


def _contents(folder):
  folder = pathlib.Path(folder)
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


# One picture.


@pytest.mark.parametrize('defect', ALL)
def test_mask_is_where_the_picture_changed(defect):
  for index in range(6):
    name = f'{defect}/{index}'
    clean, nothing = surfaces.surface(name, 128)
    image, mask = surfaces.surface(name, 128, defect=defect)
    assert image.dtype == np.uint8 and image.shape == (128, 128, 3)
    assert mask.dtype == np.uint8 and mask.shape == (128, 128)
    assert set(np.unique(mask)) == {0, 1} and not nothing.any()
    change = np.abs(image.astype(int) - clean).max(axis=-1)
    assert not change[mask == 0].any()
    # Clearly seen, and nearly everywhere: a dent's shading passes through 0,
    # and another weave has here and there the grey of the first.
    assert change[mask == 1].mean() > 20
    assert (change[mask == 1] >= 4).mean() > 0.9


@pytest.mark.parametrize(
  ('defect', 'low', 'high'),
  [
    ('scratch', 0.003, 0.03),
    ('stain', 0.008, 0.08),
    ('dent', 0.008, 0.05),
    ('thread', 0.008, 0.05),
    ('part_missing', 0.01, 0.05),
    ('part_moved', 0.02, 0.09),
    ('large_area', 0.2, 0.4),
  ],
)
def test_covered_area(defect, low, high):
  for index in range(6):
    _, mask = surfaces.surface(f'{index}', 128, defect=defect)
    assert low < mask.mean() < high


def test_a_moved_part_leaves_one_place_and_takes_another():
  """Two places of one size; ink or an eyelet goes from one, to the other."""
  found = 0
  for index in range(8):
    clean, _ = surfaces.surface(f'{index}', 128)
    image, mask = surfaces.surface(f'{index}', 128, defect='part_moved')
    blobs, count = ndimage.label(ndimage.binary_closing(mask, iterations=4))
    if count != 2:  # The two places overlap.
      continue
    found += 1
    places = [(blobs == blob) & (mask == 1) for blob in (1, 2)]
    areas = [place.sum() for place in places]
    assert min(areas) > 0.85 * max(areas)
    # Ink makes its place darker, an eyelet richer in contrast.
    darker = [image[p].mean() - clean[p].mean() for p in places]
    richer = [image[p].std() - clean[p].std() for p in places]
    assert min(darker) < 0 < max(darker) or min(richer) < 0 < max(richer)
  assert found >= 2


def test_good_pictures_differ_but_little():
  """Parts stay put: the mean picture is sharp at an eyelet, flat on cloth."""
  images = np.stack([surfaces.surface(f'{i}', 64)[0] for i in range(24)])
  flat = images.reshape(24, -1)
  assert len(np.unique(flat, axis=0)) == 24
  mean = images.mean(axis=(0, 3))
  assert abs(mean[13, 13] - mean[32, 32]) > 50  # The hole.
  assert ndimage.gaussian_filter(mean, 3)[28:36, 28:36].std() < 5
  assert 5 < images.std(axis=0).mean() < 30


def test_pictures_are_neither_dark_nor_clipped():
  for defect in (None, *ALL):
    image, _ = surfaces.surface('a', 96, defect=defect)
    assert 90 < image.mean() < 190
    assert (image == 255).mean() < 0.01


def test_pictures_depend_on_seed_name_and_size_alone():
  image, mask = surfaces.surface('a', 64, 5, 'stain')
  again, mask_again = surfaces.surface('a', 64, 5, 'stain')
  np.testing.assert_array_equal(image, again)
  np.testing.assert_array_equal(mask, mask_again)
  for other in (('b', 64, 5), ('a', 64, 6), ('a', 64, -5)):
    assert (
      surfaces.surface(*other)[0] != surfaces.surface('a', 64, 5)[0]
    ).any()


# The set.


def test_the_set_is_a_valid_category(tmp_path):
  path = surfaces.write_surfaces(tmp_path, **SMALL)
  assert path == str(tmp_path / surfaces.CATEGORY)
  dataset = layouts.list_mvtec(tmp_path, surfaces.CATEGORY)
  everything = dataset.train + dataset.test
  assert images_lib.validate(everything) == everything
  assert len(dataset.train) == 3
  kinds = [record.defect for record in dataset.test]
  assert {kind: kinds.count(kind) for kind in kinds} == {
    'good': 2,
    'scratch': 2,
    'stain': 2,
    'dent': 2,
    'thread': 2,
  }
  images, masks = images_lib.load_arrays(dataset.test, 48)
  for i, record in enumerate(dataset.test):
    name = os.path.relpath(record.image, path).removesuffix('.png')
    defect = None if record.defect == 'good' else record.defect
    image, mask = surfaces.surface(name, 48, 0, defect)
    np.testing.assert_array_equal(images[i], image)
    np.testing.assert_array_equal(masks[i, ..., 0], mask)


def test_all_pictures_are_different(tmp_path):
  path = surfaces.write_surfaces(tmp_path, **SMALL, defects=ALL)
  contents = _contents(path)
  pictures = [v for k, v in contents.items() if not k.startswith('ground')]
  assert len(set(pictures)) == len(pictures) == 3 + 2 + 2 * 7 + 1


def test_two_writes_are_byte_identical(tmp_path):
  a = surfaces.write_surfaces(tmp_path / 'a', **SMALL, seed=3)
  b = surfaces.write_surfaces(tmp_path / 'b', **SMALL, seed=3)
  c = surfaces.write_surfaces(tmp_path / 'c', **SMALL, seed=4)
  assert _contents(a) == _contents(b)
  assert _contents(a) != _contents(c)


def test_more_pictures_leave_the_others_as_they_were(tmp_path):
  few = _contents(surfaces.write_surfaces(tmp_path / 'a', **SMALL))
  more = _contents(
    surfaces.write_surfaces(
      tmp_path / 'b', **{**SMALL, 'train': 5}, defects=ALL
    )
  )
  few.pop(surfaces.MARKER)
  assert few.items() <= more.items()


def test_a_complete_set_is_left_alone(tmp_path):
  path = surfaces.write_surfaces(tmp_path, **SMALL)
  picture = pathlib.Path(path, 'train/good/000.png')
  picture.write_bytes(b'touched')
  surfaces.write_surfaces(tmp_path, **SMALL)
  assert picture.read_bytes() == b'touched'


def test_other_arguments_replace_the_set(tmp_path):
  surfaces.write_surfaces(tmp_path, **SMALL, defects=ALL)
  path = surfaces.write_surfaces(tmp_path, **SMALL, defects=('dent',))
  fresh = surfaces.write_surfaces(
    tmp_path / 'fresh', **SMALL, defects=('dent',)
  )
  assert _contents(path) == _contents(fresh)
  assert sorted(os.listdir(tmp_path)) == ['fresh', 'surface']


def test_an_interrupted_write_is_redone(tmp_path, monkeypatch):
  expected = _contents(surfaces.write_surfaces(tmp_path / 'whole', **SMALL))
  calls = []

  def surface(*args):
    calls.append(args)
    if len(calls) == 6:
      raise KeyboardInterrupt
    return original(*args)

  original = surfaces.surface
  with monkeypatch.context() as patch:
    patch.setattr(surfaces, 'surface', surface)
    with pytest.raises(KeyboardInterrupt):
      surfaces.write_surfaces(tmp_path / 'cut', **SMALL)
  assert os.listdir(tmp_path / 'cut') == []
  path = surfaces.write_surfaces(tmp_path / 'cut', **SMALL)
  assert _contents(path) == expected


def test_an_interrupted_replacement_keeps_the_earlier_set(
  tmp_path, monkeypatch
):
  path = surfaces.write_surfaces(tmp_path, **SMALL)
  before = _contents(path)
  monkeypatch.setattr(surfaces, 'surface', lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    surfaces.write_surfaces(tmp_path, **SMALL, seed=1)
  assert _contents(path) == before
  assert os.listdir(tmp_path) == ['surface']


def test_someone_elses_folder_is_not_overwritten(tmp_path):
  mine = tmp_path / 'surface/train/good/mine.png'
  mine.parent.mkdir(parents=True)
  mine.write_bytes(b'precious')
  with pytest.raises(ValueError, match='not overwritten') as error:
    surfaces.write_surfaces(tmp_path, **SMALL)
  assert str(tmp_path / 'surface') in str(error.value)
  (tmp_path / 'surface' / surfaces.MARKER).write_text(json.dumps([1]))
  with pytest.raises(files.DatasetError):
    surfaces.write_surfaces(tmp_path, **SMALL)
  assert mine.read_bytes() == b'precious'


def test_an_unwritable_place_is_named(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(ValueError, match='cannot be written') as error:
    surfaces.write_surfaces(tmp_path / 'file', **SMALL)
  assert str(tmp_path / 'file') in str(error.value)


@pytest.mark.parametrize(
  'argument', [{'size': 8}, {'train': 0}, {'test_good': -1}, {'per_defect': -1}]
)
def test_arguments_out_of_range(tmp_path, argument):
  (name,) = argument
  with pytest.raises(ValueError, match=f'{name} is '):
    surfaces.write_surfaces(tmp_path, **{**SMALL, **argument})
  assert not os.listdir(tmp_path)


def test_unknown_defects(tmp_path):
  with pytest.raises(ValueError, match='dint, expected kinds out of scratch'):
    surfaces.write_surfaces(tmp_path, **SMALL, defects=('dent', 'dint'))


def test_masks_are_black_and_white_files(tmp_path):
  path = surfaces.write_surfaces(tmp_path, **SMALL)
  with Image.open(f'{path}/ground_truth/stain/000_mask.png') as file:
    assert file.mode == 'L'
    assert np.unique(np.asarray(file)).tolist() == [0, 255]


# Textures.


def test_textures_are_repeatable_one_by_one():
  textures = textures_lib.procedural_textures(14, 64, seed=2)
  assert textures.shape == (14, 64, 64, 3) and textures.dtype == np.uint8
  few = textures_lib.procedural_textures(5, 64, seed=2)
  np.testing.assert_array_equal(textures[:5], few)
  assert (textures_lib.procedural_textures(5, 64, seed=3) != few).any()
  assert textures_lib.procedural_textures(0, 64).shape == (0, 64, 64, 3)


@pytest.mark.parametrize('size', [32, 37, 128])
def test_textures_are_textures(size):
  """None is flat, most have colour, and no two are alike."""
  textures = textures_lib.procedural_textures(48, size).astype(float)
  assert textures.std(axis=(1, 2)).max(axis=-1).min() > 8
  colour = textures.max(axis=-1) - textures.min(axis=-1)
  assert (colour.mean(axis=(1, 2)) > 10).mean() > 0.6
  means = textures.mean(axis=(1, 2))
  distance = np.abs(means[:, np.newaxis] - means).max(axis=-1)
  np.fill_diagonal(distance, 255)
  assert distance.min() > 0
  assert means.std(axis=0).min() > 20
