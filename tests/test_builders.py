"""Each TFDS builder prepares a fake set offline, as tfds.testing asks."""

import importlib
import json
import os
import pathlib
import tarfile
import tempfile

import layout_helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dmdd_jax.data import layouts


def _mvtec(root):
  """MPDD's tree under another name: the layout is the same."""
  layout_helpers.SETS['mpdd'](root)
  (root / 'tubes').rename(root / 'bottle')
  return 'bottle', (3, 1, 1), {'anomalous'}


def _loco(root):
  found = layout_helpers.SETS['mvtec_loco'](root)
  config = [
    {
      'defect_name': 'relative',
      'pixel_value': 255,
      'saturation_threshold': 0.5,
      'relative_saturation': True,
    },
    {
      'defect_name': 'absolute',
      'pixel_value': 130,
      'saturation_threshold': 10,
      'relative_saturation': False,
    },
  ]
  (root / 'pushpins/defects_config.json').write_text(json.dumps(config))
  return found


TREES = {'mvtec_ad': _mvtec, **layout_helpers.SETS, 'mvtec_loco': _loco}


def _builder(name):
  module = f'dmdd_jax.data.builders.{name}.{name}_dataset_builder'
  return importlib.import_module(module).Builder


def _prepare(name, category, manual, data_dir):
  builder = _builder(name)(config=category, data_dir=str(data_dir))
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=str(manual))
  )
  return builder


@pytest.mark.parametrize('name', TREES)
def test_a_builder_gives_what_the_layout_lists(name, tmp_path):
  # Sets usually unpack into a folder of their own.
  root = tmp_path / 'manual' / 'the set'
  root.mkdir(parents=True)
  category, counts, kinds = TREES[name](root)
  builder = _prepare(name, category, tmp_path / 'manual', tmp_path / 'data')
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
