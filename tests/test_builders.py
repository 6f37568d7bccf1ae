"""Each TFDS builder prepares a fake set offline, and what it made trains."""

import importlib
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import jax
import layout_helpers
import model_helpers
import numpy as np
import program_helpers
import pytest
import tensorflow_datasets as tfds

from configs import default
from dmdd_jax import sharding
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import pipeline
from dmdd_jax.data import textures
from dmdd_jax.models import dmdd
from dmdd_jax.training import steps

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
del TREES['mvtec_ad_2']  # It has no builder.


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
    images = [images_lib.resize_image(e['image'], 32) for e in examples]
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
    {
      **default.get_config().data,
      **{'name': name, 'root': str(root), 'category': category},
    }
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
  dataset = layouts.list_mvtec(source.parent, category)
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
    image = images_lib.read_image(record.image, None)
    np.testing.assert_array_equal(example['image'], image)
  for example, record in zip(test, defective[:2], strict=True):
    mask = 255 * images_lib.read_mask(record.mask, None)
    np.testing.assert_array_equal(example['mask'], mask)
  step, loss = train_once(trained)
  assert step == 1 and np.isfinite(loss)


def _pack(tree, archive):
  """Packs a tree as the set of that file name comes."""
  if archive.suffix == '.zip':
    with zipfile.ZipFile(archive, 'w') as packed:
      for path in sorted(p for p in tree.rglob('*') if p.is_file()):
        packed.write(path, path.relative_to(tree))
    return
  with tarfile.open(archive, 'w:xz' if archive.suffix == '.xz' else 'w') as tar:
    for entry in tree.iterdir():
      tar.add(entry, entry.name)


_ARCHIVED = {n: _builder(n).ARCHIVES for n in TREES if _builder(n).ARCHIVES}


@pytest.mark.parametrize('name', _ARCHIVED)
def test_the_archive_will_do_as_it_comes(name, tmp_path):
  category, counts, _ = TREES[name](tmp_path / 'tree')
  manual = tmp_path / 'manual'
  manual.mkdir()
  _pack(tmp_path / 'tree', manual / _ARCHIVED[name][0])
  builder = _prepare(name, category, manual, tmp_path / 'data')
  assert builder.info.splits['train'].num_examples == counts[0]
  assert builder.info.splits['test'].num_examples == sum(counts[1:])
  assert [path.name for path in manual.iterdir()] == [_ARCHIVED[name][0]]


# Says that it is there, and begins when it is told.
_PREPARE = """
import sys
import tensorflow_datasets as tfds
from dmdd_jax.data.builders.visa import visa_dataset_builder
category, manual, data_dir = sys.argv[1:]
builder = visa_dataset_builder.Builder(config=category, data_dir=data_dir)
print('ready', flush=True)
sys.stdin.readline()
builder.download_and_prepare(
  download_config=tfds.download.DownloadConfig(manual_dir=manual)
)
for split in ('train', 'test'):
  for example in tfds.as_numpy(builder.as_dataset(split)):
    print(split, example['filename'].decode(), example['image'].sum())
"""


def test_two_processes_prepare_the_same_archive_at_once(tmp_path):
  tree, manual, data_dir = (tmp_path / n for n in ('tree', 'manual', 'data'))
  category, counts, _ = TREES['visa'](tree)
  manual.mkdir()
  _pack(tree, manual / _ARCHIVED['visa'][0])
  command = [sys.executable, '-c', _PREPARE, category, manual, data_dir]
  processes = [
    subprocess.Popen(
      [str(word) for word in command],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, 'PYTHONPATH': program_helpers.REPOSITORY},
    )
    for _ in range(2)
  ]
  assert [p.stdout.readline() for p in processes] == ['ready\n'] * 2
  for process in processes:
    process.stdin.write('\n')
    process.stdin.flush()
  said = [process.communicate(timeout=300) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], said
  first, second = (
    [line for line in out.splitlines() if line.startswith(('train ', 'test '))]
    for out, _ in said
  )
  assert first == second and len(first) == sum(counts)
  assert (said[0][0] + said[1][0]).count('downloaded and prepared') == 1
  assert not list(data_dir.rglob('*incomplete*'))


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
