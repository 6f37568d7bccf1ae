"""Textures from folders and from a prepared set of TensorFlow Datasets."""

import shutil

import layout_helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

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
