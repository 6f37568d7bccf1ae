"""Textures from folders and from a prepared set of TensorFlow Datasets."""

import os
import shutil

import layout_helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dmdd_jax.data import files
from dmdd_jax.data import textures

CLASSES = ('banded', 'zigzagged')


@pytest.fixture(scope='module')
def dtd(tmp_path_factory):
  """A fake DTD, and the catalogue's builder's preparation of it."""
  root = tmp_path_factory.mktemp('DTD ä')
  names = []
  for index in range(9):
    kind = CLASSES[index % 2]
    names.append(f'{kind}/{kind}_{index:04d}.jpg')
    picture = layout_helpers.picture(40 + index, 30 + 3 * index, seed=index)
    layout_helpers.save(root / 'dtd/images' / names[-1], picture)
  (root / 'dtd/labels').mkdir()
  for part, split in enumerate(('train1', 'test1', 'val1')):
    text = '\n'.join(names[part::3]) + '\n'
    (root / f'dtd/labels/{split}.txt').write_text(text)
  prepared = root / 'tensorflow datasets'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      tfds.download.DownloadManager,
      'download_and_extract',
      lambda self, url: str(root),
    )
    builder = tfds.image_classification.Dtd(data_dir=str(prepared))
    builder.download_and_prepare()
  return root / 'dtd', prepared


@pytest.mark.parametrize('limit', [0, 4, 100])
def test_a_prepared_dtd_is_its_folder(dtd, limit, monkeypatch):
  folder, prepared = dtd
  monkeypatch.setenv('TFDS_DATA_DIR', str(prepared))
  for seed in (0, 1):
    options = {'size': 32, 'limit': limit, 'seed': seed}
    found = textures.load('tfds:dtd', **options)
    assert found.shape == (limit if limit == 4 else 9, 32, 32, 3)
    np.testing.assert_array_equal(found, textures.load(str(folder), **options))


def test_a_dtd_that_nobody_prepared_says_what_to_do(dtd, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  message = r'no prepared set in .*/dtd\. Prepare it .*tfds build dtd'
  with pytest.raises(FileNotFoundError, match=message):
    textures.load('tfds:dtd', 32, limit=0, seed=0)
  # One that was interrupted is none.
  shutil.copytree(dtd[1] / 'dtd', tmp_path / 'dtd')
  next(tmp_path.glob('dtd/*/dataset_info.json')).unlink()
  with pytest.raises(FileNotFoundError, match=message):
    textures.load('tfds:dtd', 32, limit=0, seed=0)


def test_another_set_is_refused():
  with pytest.raises(ValueError, match=r"textures is 'tfds:cifar10'"):
    textures.load('tfds:cifar10', 32, limit=0, seed=0)


def test_no_source_means_procedural():
  found = textures.load('', 32, limit=0, seed=0)
  assert len(found) == 200 and len(np.unique(found)) > 100
  few = textures.load('', 32, limit=5, seed=0)
  np.testing.assert_array_equal(few, found[:5])


# Folders.


def test_textures_at_any_depth(tmp_path):
  layout_helpers.save(tmp_path / 'images/wood/b.jpg', layout_helpers.picture())
  layout_helpers.save(tmp_path / 'images/a.PNG', layout_helpers.picture())
  layout_helpers.save(tmp_path / '.hidden/c.png', layout_helpers.picture())
  (tmp_path / 'labels.txt').write_text('x')
  (tmp_path / 'images/loop').symlink_to(tmp_path)
  found = textures.list_textures(tmp_path)
  assert found == (
    str(tmp_path / 'images/a.PNG'),
    str(tmp_path / 'images/wood/b.jpg'),
  )


def test_no_textures(tmp_path):
  with pytest.raises(FileNotFoundError, match='found nothing'):
    textures.list_textures(tmp_path / 'dtd')
  with pytest.raises(ValueError, match='--config.data.textures'):
    textures.list_textures(tmp_path)


def test_textures_are_cut_at_the_centre(tmp_path):
  """The middle third of a picture of three coloured squares is left."""
  array = np.zeros((20, 60, 3), np.uint8)
  array[:, :20, 0] = array[:, 20:40, 1] = array[:, 40:, 2] = 250
  path = layout_helpers.save(tmp_path / 'a.png', array)
  (texture,) = textures.load_textures([str(path)], 10)
  assert texture.shape == (10, 10, 3) and texture.dtype == np.uint8
  # The filter that shrinks reaches one pixel beyond the cut.
  np.testing.assert_array_equal(texture[:, 1:-1, 1], 250)
  assert not texture[:, 1:-1, [0, 2]].any()
  assert texture[..., 1].min() > 200


def test_limited_textures_are_a_fixed_choice(tmp_path):
  for i in range(12):
    layout_helpers.save(
      tmp_path / f'{i}.png', np.full((4, 4, 3), 10 * i, np.uint8)
    )
  paths = textures.list_textures(tmp_path)

  def chosen(paths, limit, seed):
    return textures.load_textures(paths, 4, limit, seed)[:, 0, 0, 0].tolist()

  few = chosen(paths, 4, 0)
  assert len(set(few)) == 4
  assert chosen(paths[::-1], 4, 0) == few
  assert any(chosen(paths, 4, seed) != few for seed in (1, 2))
  assert sorted(chosen(paths, 0, 0)) == [10 * i for i in range(12)]
  assert chosen(paths, 50, 0) == chosen(paths, 0, 0)


def test_a_bad_texture_is_named(tmp_path):
  (tmp_path / 'a.png').write_text('x')
  with pytest.raises(
    files.BadImageError, match='a.png.*Remove it from the textures'
  ):
    textures.load_textures(textures.list_textures(tmp_path), 4)


DATA = os.environ.get('DMDD_TEST_DATA')
needs_data = pytest.mark.skipif(
  not DATA, reason='DMDD_TEST_DATA, the folder of real images, is not set'
)


@needs_data
def test_real_textures():
  paths = textures.list_textures(os.path.join(DATA, 'dtd'))
  assert len(paths) == 1200
  assert textures.load_textures(paths, 64, 20).std(axis=(1, 2)).max() > 20
