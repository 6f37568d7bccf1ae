"""Each TFDS builder prepares a fake set offline, and what it made trains."""

import importlib
import os
import pathlib
import tarfile
import tempfile

import jax
import layout_helpers
import model_helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dmdd_jax import sharding
from dmdd_jax import steps
from dmdd_jax.data import layouts
from dmdd_jax.data import pipeline
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import textures
from dmdd_jax.models import dmdd

DATA = os.environ.get('DMDD_TEST_DATA')
needs_data = pytest.mark.skipif(
  not DATA, reason='DMDD_TEST_DATA, the folder of real images, is not set'
)


def _mvtec(root):
  """MPDD's tree under another name: the layout is the same."""
  layout_helpers.SETS['mpdd'](root)
  (root / 'tubes').rename(root / 'bottle')
  return 'bottle', (3, 1, 1), {'anomalous'}


TREES = {'mvtec_ad': _mvtec, **layout_helpers.SETS}


def _builder(name):
  module = f'dmdd_jax.data.builders.{name}.{name}_dataset_builder'
  return importlib.import_module(module).Builder


def _prepare(name, category, manual, data_dir):
  builder = _builder(name)(config=category, data_dir=str(data_dir))
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=str(manual))
  )
  return builder


@pytest.fixture(scope='module')
def train_once():
  """A function that takes one step on examples; it is compiled once."""
  config = model_helpers.tiny_config()
  model = dmdd.from_config(config)
  step = steps.make_train_steps(
    config, model, sharding.make_mesh(jax.devices()[:1])
  )['distill']
  fillings = textures.load('', 32, limit=0, seed=0)

  def train(examples):
    images = [records_lib.resize_image(e['image'], 32) for e in examples]
    options = pipeline.options(config)
    (batch,) = pipeline.train_dataset(
      np.stack(images), fillings, options, seed=0, batch_size=4, total_steps=1
    ).as_numpy_iterator()
    batch = {key: batch[key] for key in ('image', 'normal', 'mask')}
    state, metrics = step(model_helpers.make_state(config, model), batch)
    return int(state.step), float(metrics['loss'])

  return train


def _contents(folder):
  """What stands in a folder, and when it was last changed."""
  return {
    path: (path.stat().st_mtime_ns, path.stat().st_size)
    for path in [folder, *folder.rglob('*')]
  }


@pytest.mark.parametrize('name', TREES)
def test_a_builder_gives_what_the_layout_lists_and_it_trains(
  name, tmp_path, train_once
):
  # Sets usually unpack into a folder of their own.
  root = tmp_path / 'mes données' / 'the set'
  root.mkdir(parents=True)
  category, counts, kinds = TREES[name](root)
  for path in [root, *root.rglob('*')]:
    path.chmod(0o555)  # Nothing is ever written beside the data.
  before = _contents(root.parent)
  builder = _prepare(name, category, root.parent, tmp_path / 'préparé')
  assert _contents(root.parent) == before
  dataset = layouts.list_dataset(
    {'name': name, 'root': str(root), 'category': category}
  )
  for split, records in (('train', dataset.train), ('test', dataset.test)):
    examples = list(tfds.as_numpy(builder.as_dataset(split)))
    names = [os.path.relpath(r.image, root) for r in records]
    assert [e['filename'].decode() for e in examples] == names
    assert [e['label'] for e in examples] == [r.label for r in records]
    assert [e['defect'].decode() for e in examples] == [
      r.defect for r in records
    ]
    for example in examples:
      assert example['image'].shape == (12, 16, 3)
      assert example['mask'].any() == bool(example['label'])
      assert set(np.unique(example['mask'])) <= {0, 255}
  assert builder.info.splits['train'].num_examples == counts[0]
  assert builder.info.splits['test'].num_examples == sum(counts[1:])
  assert builder.info.citation and builder.info.description
  assert builder.info.homepage.startswith('https://')
  if name == 'mvtec_loco':
    (areas, *_) = [e['saturation'] for e in examples if e['label']]
    np.testing.assert_allclose(areas, [0.5 * 4 * 16, 10.0])

  trained = list(tfds.as_numpy(builder.as_dataset('train')))
  step, loss = train_once(trained)
  assert step == 1 and np.isfinite(loss)


@needs_data
@pytest.mark.parametrize('category', ['screw', 'toothbrush'])
def test_links_to_some_of_the_real_images_train(category, tmp_path, train_once):
  source = pathlib.Path(DATA) / 'mvtec' / category
  target = tmp_path / 'manual' / category
  dataset = records_lib.list_mvtec(source.parent, category)
  defective = [r for r in dataset.test if r.label]
  for record in (*dataset.train[:4], *defective[:2]):
    for path in filter(None, (record.image, record.mask)):
      link = target / os.path.relpath(path, source)
      link.parent.mkdir(parents=True, exist_ok=True)
      link.symlink_to(path)
  builder = _prepare('mvtec_ad', category, tmp_path / 'manual', tmp_path / 'd')
  trained, test = (
    list(tfds.as_numpy(builder.as_dataset(s))) for s in ('train', 'test')
  )
  for example, record in zip(trained, dataset.train[:4], strict=True):
    image = records_lib.read_image(record.image, None)
    np.testing.assert_array_equal(example['image'], image)
  for example, record in zip(test, defective[:2], strict=True):
    mask = 255 * records_lib.read_mask(record.mask, None)
    np.testing.assert_array_equal(example['mask'], mask)
  step, loss = train_once(trained)
  assert step == 1 and np.isfinite(loss)


def test_one_that_is_overtaken_takes_what_the_other_prepared(
  tmp_path, monkeypatch
):
  """Two processes at once: the other ends while this one is at work."""
  manual, data_dir = tmp_path / 'manual', tmp_path / 'data'
  manual.mkdir()
  category, counts, _ = TREES['mpdd'](manual)
  slow = _builder('mpdd')(config=category, data_dir=str(data_dir))
  generators = slow._split_generators

  def overtaken(dl_manager):
    _prepare('mpdd', category, manual, data_dir)
    return generators(dl_manager)

  monkeypatch.setattr(slow, '_split_generators', overtaken)
  slow.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=str(manual))
  )
  assert slow.info.splits['train'].num_examples == counts[0]
  examples = list(tfds.as_numpy(slow.as_dataset('train')))
  assert len(examples) == counts[0]
  assert not list(data_dir.glob('**/*incomplete*'))


def test_an_archive_will_do(tmp_path):
  tree = tmp_path / 'VisA'
  tree.mkdir()
  category, counts, _ = TREES['visa'](tree)
  manual = tmp_path / 'manual'
  manual.mkdir()
  with tarfile.open(manual / 'VisA_20220922.tar', 'w') as archive:
    for entry in tree.iterdir():
      archive.add(entry, entry.name)
  builder = _prepare('visa', category, manual, tmp_path / 'data')
  assert builder.info.splits['train'].num_examples == counts[0]


def test_without_the_data_it_says_where_to_get_them(tmp_path):
  builder = _builder('btad')(config='01', data_dir=str(tmp_path / 'data'))
  with pytest.raises(FileNotFoundError, match=r'avires.*btad\.zip'):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
        manual_dir=str(tmp_path / 'gone')
      )
    )


def _case(name):
  """The checks of tfds.testing for one builder, over one fake category."""
  folder = tempfile.mkdtemp()
  root = pathlib.Path(folder)
  category, counts, _ = TREES[name](root)

  class Case(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = _builder(name)
    EXAMPLE_DIR = folder
    BUILDER_CONFIG_NAMES_TO_TEST = [category]
    SPLITS = {'train': counts[0], 'test': sum(counts[1:])}
    OVERLAPPING_SPLITS = ['train', 'test']

  Case.__name__ = f'Case_{name}'
  return Case


for _name in TREES:
  globals()[f'TestBuilder_{_name}'] = _case(_name)
