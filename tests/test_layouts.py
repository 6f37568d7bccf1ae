"""Data sets in other layouts: what is listed, what is said, what is refused."""

import json
import os
import shutil

import layout_helpers
import numpy as np
from PIL import Image
import pytest

from configs import folder as folder_config
from dmdd_jax import run as run_lib
from dmdd_jax import trainer as trainer_lib
from dmdd_jax.data import check
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.report import archive


@pytest.fixture
def root(tmp_path):
  """Ten normal images, a scratch, a dent and a plain defect, with masks."""
  root = tmp_path / 'meine teile Ü'
  for i in range(10):
    layout_helpers.save(root / f'ok/{i}.png', layout_helpers.picture(seed=i))
  for i, name in enumerate(('scratch/a.jpg', 'dent/b.png', 'c.tif')):
    layout_helpers.save(
      root / 'bad' / name, layout_helpers.picture(seed=20 + i)
    )
  layout_helpers.save(root / 'truth/scratch/a_mask.png', layout_helpers.mask())
  layout_helpers.save(root / 'truth/b.png', layout_helpers.mask())
  layout_helpers.save(root / 'truth/c.bmp', layout_helpers.mask())
  return root


def _data(root, **fields):
  data = folder_config.get_config().data
  data.root = str(root)
  data.update({'normal': 'ok', **fields})
  return data


def _name(record):
  return os.path.basename(record.image)


def test_an_own_folder_with_everything(root, warnings):
  data = _data(root, defect='bad', masks='truth', test_fraction=0.3)
  dataset = layouts.list_dataset(data)
  good = [r for r in dataset.test if not r.label]
  assert len(dataset.train) == 7 and len(good) == 3
  names = {_name(r) for r in (*dataset.train, *good)}
  assert names == {f'{i}.png' for i in range(10)}
  bad = {_name(r): r for r in dataset.test if r.label}
  assert {n: r.defect for n, r in bad.items()} == {
    'a.jpg': 'scratch',
    'b.png': 'dent',
    'c.tif': 'defect',
  }
  assert {n: os.path.basename(r.mask) for n, r in bad.items()} == {
    'a.jpg': 'a_mask.png',
    'b.png': 'b.png',
    'c.tif': 'c.bmp',
  }
  assert not warnings
  assert images_lib.validate(dataset.train + dataset.test)


def test_the_share_for_the_test_depends_on_its_seed_alone(root):
  def held(**fields):
    dataset = layouts.list_dataset(_data(root, defect='bad', **fields))
    return [_name(r) for r in dataset.test if not r.label]

  assert held() == held() and len(held()) == 2
  assert any(held(test_seed=s) != held() for s in (1, 2, 3))
  assert len(held(test_fraction=0.5)) == 5


def test_normal_images_for_the_test_are_not_drawn_where_they_are_named(root):
  layout_helpers.save(root / 'more/x.png', layout_helpers.picture(seed=40))
  data = _data(root, defect='bad/**/*.*', test_normal='more')
  dataset = layouts.list_dataset(data)
  assert len(dataset.train) == 10
  assert [_name(r) for r in dataset.test if not r.label] == ['x.png']
  # Of a glob there is no folder that could name a kind of defect.
  assert {r.defect for r in dataset.test if r.label} == {'defect'}


def test_no_masks_and_some_masks_are_said(root, warnings):
  dataset = layouts.list_dataset(_data(root, defect='bad'))
  assert not any(r.has_truth for r in dataset.test if r.label)
  assert all(r.has_truth for r in dataset.test if not r.label)
  assert '3 of 3 defective images have no mask' in warnings[0]
  assert 'mask_ID.png' in warnings[0]
  (root / 'truth/b.png').unlink()
  layout_helpers.save(root / 'truth/z.png', layout_helpers.mask())
  warnings.clear()
  dataset = layouts.list_dataset(_data(root, defect='bad', masks='truth'))
  assert sum(not r.has_truth for r in dataset.test) == 1
  assert '1 of 3' in warnings[0] and 'b.png' in warnings[0]
  assert 'without an image' in warnings[1] and 'z.png' in warnings[1]


def test_no_defects_means_no_test_and_all_images_to_train_on(root, warnings):
  dataset = layouts.list_dataset(_data(root))
  assert len(dataset.train) == 10 and dataset.test == ()
  assert 'data.defect is not set' in warnings[0]


def test_masks_below_the_defects_are_no_images(root):
  (root / 'truth').rename(root / 'bad/truth')
  dataset = layouts.list_dataset(_data(root, defect='bad', masks='bad/truth'))
  bad = [r for r in dataset.test if r.label]
  assert len(bad) == 3 and all(r.mask for r in bad)


def test_the_same_stem_in_two_folders_keeps_its_own_mask(root):
  layout_helpers.save(root / 'bad/dent/a.png', layout_helpers.picture(seed=50))
  layout_helpers.save(root / 'truth/dent/a.png', layout_helpers.mask())
  data = _data(root, defect='bad', masks='truth')
  found = {r.defect: r for r in layouts.list_dataset(data).test if r.label}
  assert found['scratch'].mask.endswith('scratch/a_mask.png')
  (root / 'bad/a.png').write_bytes((root / 'bad/dent/a.png').read_bytes())
  layout_helpers.save(root / 'truth/x/a.png', layout_helpers.mask())
  (root / 'truth/scratch/a_mask.png').unlink()
  with pytest.raises(ValueError, match='all match the image'):
    layouts.list_dataset(data)


def test_a_list_and_a_glob_of_folders_name_images(tmp_path):
  for lot in ('lot1', 'lot2'):
    layout_helpers.save(tmp_path / lot / 'ok/000.png', layout_helpers.picture())
    layout_helpers.save(tmp_path / lot / 'ko/000.png', layout_helpers.picture())
  (tmp_path / 'lists').mkdir()
  (tmp_path / 'lists/ko.txt').write_text('../lot1/ko\n../lot2/ko/000.png\n')
  fields = {'normal': 'lot1/ok/000.png', 'test_normal': 'lot[2]/o*'}
  data = _data(tmp_path, defect='lists/ko.txt', **fields)
  dataset = layouts.list_dataset(data)
  assert [record.image for record in dataset.train + dataset.test] == [
    f'{tmp_path}/lot1/ok/000.png',
    f'{tmp_path}/lot2/ok/000.png',
    f'{tmp_path}/lists/../lot1/ko/000.png',
    f'{tmp_path}/lists/../lot2/ko/000.png',
  ]


@pytest.mark.parametrize(
  ('fields', 'error', 'text'),
  [
    ({'normal': ''}, FileNotFoundError, 'no normal images'),
    (
      {'normal': 'gone'},
      FileNotFoundError,
      r'data\.normal=.*gone: holds no image',
    ),
    ({'normal': 'ok/*.jpg'}, FileNotFoundError, r'jpg: holds no image'),
    ({'normal': 'empty'}, ValueError, r'data\.normal: found no image'),
    ({'defect': 'ok'}, ValueError, 'name the same 10 images'),
    (
      {'test_normal': 'ok/1*', 'defect': 'bad'},
      ValueError,
      'name the same 1 images',
    ),
    ({'defect': 'bad', 'masks': 'x'}, FileNotFoundError, r'data\.masks'),
    ({'defect': 'bad', 'masks': 'bad'}, ValueError, 'the same directory'),
    ({'defect': 'bad', 'test_fraction': 0.0}, ValueError, 'test_fraction'),
    (
      {'name': 'mvtec'},
      ValueError,
      r"data\.name is 'mvtec'.*mvtec_ad, .*folder",
    ),
  ],
)
def test_what_cannot_be_meant_names_its_field(root, fields, error, text):
  (root / 'empty').mkdir()
  with pytest.raises(error, match=text):
    layouts.list_dataset(_data(root, **fields))


def test_a_folder_of_good_images_among_the_defects_is_refused(root):
  layout_helpers.save(root / 'bad/good/0.png', layout_helpers.picture())
  with pytest.raises(ValueError, match="holds a folder 'good'"):
    layouts.list_dataset(_data(root, defect='bad'))


def test_every_kind_of_image_through_a_folder(tmp_path, warnings):
  """Each file shows the same grey ramp, wider than high."""
  ramp = np.tile(np.arange(0, 240, 10, np.uint8), (12, 1))
  rgb = np.stack([ramp] * 3, axis=-1)
  normal = tmp_path / 'n'
  layout_helpers.save(normal / 'rgb.png', rgb)
  layout_helpers.save(normal / 'grey.bmp', ramp)
  layout_helpers.save(normal / 'deep.png', ramp.astype(np.uint16) * 257)
  layout_helpers.save(normal / 'deep.tiff', ramp.astype(np.uint16) * 257)
  layout_helpers.save(
    normal / 'alpha.png', np.dstack([rgb, np.full_like(ramp, 255)])
  )
  layout_helpers.save(normal / 'lossless.webp', rgb, lossless=True)
  layout_helpers.save(normal / 'photo.JPG', rgb, quality=98)
  palette = Image.fromarray(ramp).convert('P')
  palette.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
  palette.save(normal / 'palette.png')
  exif = Image.Exif()
  exif[0x0112] = 6  # Stored a quarter turn to the left.
  layout_helpers.save(normal / 'turned.png', np.rot90(rgb), exif=exif)
  dataset = layouts.list_dataset(_data(tmp_path, normal='n'))
  assert len(images_lib.validate(dataset.train)) == 9
  images, _ = images_lib.load_arrays(dataset.train, 32)
  for record, image in zip(dataset.train, images):
    assert image.shape == (32, 32, 3)
    np.testing.assert_allclose(image, images[-1], atol=3, err_msg=record.image)
  assert images[-1][:, -1].min() > images[-1][:, 0].max() + 200
  assert len(warnings) == 1  # That there are no defects.


def _tiny(root, **fields):
  config = folder_config.get_config()
  config.data = _data(root, **fields)
  config.data.image_size = 32
  config.data.holdout_min = 2
  config.teacher.weights = 'random'
  config.student.trunk = 'encoder'
  config.train.batch_size = 2
  config.train.total_steps = 2
  config.train.distill_steps = 1
  return config


@pytest.mark.parametrize('defects', [False, True])
def test_a_folder_trains_evaluates_and_says_what_is_missing(
  root, tmp_path, defects
):
  """No defects: every metric null. No masks: image metrics alone."""
  fields = {'defect': 'bad'} if defects else {}
  config = _tiny(root, **fields)
  config.eval.resolutions = ('model', 'native')
  run = tmp_path / 'run'
  table = run_lib.run_categories(config, str(run))
  assert '| folder |' in table
  results = json.loads((run / 'folder/results.json').read_text())
  assert results['au_pro'] is None and results['native']['au_pro'] is None
  assert results['maps_mean']['pixel_auroc'] is None
  reasons = results['undefined']
  if defects:
    assert results['image_auroc'] is not None
    assert reasons['pixel_auroc'] == '3 of 3 defective images have no mask'
    assert results['at_threshold']['pixel_f1'] is None
    assert results['at_threshold']['image_recall'] is not None
  else:
    assert results['image_auroc'] is None
    assert reasons['image_auroc'] == 'no images'
  again = run_lib.evaluate_run(str(run), str(tmp_path / 'again'))
  assert again == table


def test_own_images_that_moved_are_evaluated_where_they_are(
  root, tmp_path, monkeypatch
):
  """Trained with relative paths; the message says to what."""
  monkeypatch.chdir(root)
  run, there = str(tmp_path / 'run'), tmp_path / 'there'
  expected = run_lib.run_categories(_tiny('', defect='bad', masks='truth'), run)
  root.rename(there)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(files.MissingDataError) as caught:
    run_lib.evaluate_run(run)
  for text in ("'ok' is relative to the working directory", str(tmp_path)):
    assert text in str(caught.value)
  changes = {
    f'data.{field}': str(there / name)
    for field, name in (('normal', 'ok'), ('defect', 'bad'))
  }
  # The split of the normal images goes by their names, not by where they lie.
  changes['data.masks'] = 'there/truth'
  assert run_lib.evaluate_run(run, changes=changes) == expected
  assert run_lib.evaluate_run(run, changes={'data.root': 'there'}) == expected
  config = json.loads((tmp_path / 'run/folder/results.json').read_text())
  assert config['config']['data']['root'] == 'there'
  changes = {'data.test_normal': str(there / 'ok'), 'data.root': 'there'}
  with pytest.raises(ValueError, match='to recalibrate'):
    run_lib.evaluate_run(run, changes=changes, recalibrate=True)


def test_images_that_were_trained_on_are_not_tested(root, tmp_path, warnings):
  """With more normal images another share of them is kept for the test."""
  run = str(tmp_path / 'run')
  config = _tiny(root, defect='bad', test_fraction=0.5)
  run_lib.run_categories(config, run)
  before = {_name(r) for r in layouts.list_dataset(config.data).train}
  for i in range(20):
    layout_helpers.save(root / f'ok/new{i}.png', layout_helpers.picture(seed=i))
  share = {
    _name(r) for r in layouts.list_dataset(config.data).test if not r.label
  }
  assert share & before
  run_lib.evaluate_run(run)
  tested = {
    os.path.basename(row['file'])
    for row in archive.read_scores(os.path.join(run, 'folder'))
  }
  assert share - before <= tested and not tested & before
  named = [text for text in warnings if 'were trained on (' in text]
  assert len(named) == 1 and (share & before).pop() in named[0]


def test_training_images_that_repeat_are_named(root, warnings):
  for name in ('copy.png', 'again.png'):
    shutil.copy(root / 'ok/3.png', root / 'ok' / name)
  trainer_lib.load_data(_tiny(root))
  repeated = [text for text in warnings if 'repeat' in text]
  assert len(repeated) == 1 and '2 of 12 normal images' in repeated[0]
  assert 'copy.png' in repeated[0]


# Public sets, as their archives unpack.


@pytest.mark.parametrize('name', layout_helpers.SETS)
def test_a_public_set_is_listed_where_it_lies(tmp_path, name):
  root = tmp_path / 'ein Satz'
  root.mkdir()
  category, counts, kinds = layout_helpers.SETS[name](root)
  data = folder_config.get_config().data
  data.update({'name': name, 'root': str(root), 'category': category})
  dataset = layouts.list_dataset(data)
  labels = [r.label for r in dataset.test]
  assert (len(dataset.train), labels.count(0), labels.count(1)) == counts
  assert {r.defect for r in dataset.test if r.label} == kinds
  assert not any(r.label for r in dataset.train)
  everything = dataset.train + dataset.test
  assert images_lib.validate(everything) == everything
  _, masks = images_lib.load_arrays(everything, 32)
  assert masks.any(axis=(1, 2, 3)).tolist() == [
    bool(r.label) for r in everything
  ]
  if name == 'mvtec_loco':  # Both masks of an image, and all of each.
    (record, *_) = [r for r in dataset.test if r.label]
    assert images_lib.read_mask(record.mask, None).sum() == 8 * 16
  data.root = str(tmp_path / 'gone')
  with pytest.raises(FileNotFoundError, match='gone'):
    layouts.list_dataset(data)


@pytest.mark.parametrize('name', layout_helpers.SETS)
def test_an_unknown_category_is_refused_with_those_there(tmp_path, name):
  root = tmp_path / 'set'
  root.mkdir()
  category, *_ = layout_helpers.SETS[name](root)
  data = folder_config.get_config().data
  data.update({'name': name, 'root': str(root), 'category': 'spoon'})
  with pytest.raises(FileNotFoundError, match=f"'spoon'.*{category}"):
    layouts.list_dataset(data)


def test_a_folder_of_masks_that_disagree_is_a_bad_mask(tmp_path):
  layout_helpers.SETS['mvtec_loco'](tmp_path)
  truth = tmp_path / 'pushpins/ground_truth/logical_anomalies/000'
  layout_helpers.save(truth / '002.png', layout_helpers.mask(8, 8))
  with pytest.raises(files.BadImageError, match='differ in size'):
    images_lib.read_mask(truth, None)
  for path in truth.iterdir():
    path.unlink()
  with pytest.raises(files.BadImageError, match='no mask in this folder'):
    images_lib.read_mask(truth, None)


# The MVTec AD layout.


@pytest.fixture
def mvtec(tmp_path):
  return layout_helpers.mvtec(tmp_path / 'data')


def _names(items):
  return [(r.defect, os.path.basename(r.image)) for r in items]


def test_lists_a_category(mvtec, warnings):
  dataset = layouts.list_mvtec(mvtec, 'nut')
  assert dataset.category == 'nut'
  assert _names(dataset.train) == [('good', f'{i:03d}.png') for i in range(4)]
  assert _names(dataset.test) == [
    ('dent', '000.PNG'),
    ('good', '000.png'),
    ('good', '001.png'),
    ('scratch', '000.png'),
    ('scratch', '001.png'),
  ]
  assert [r.label for r in dataset.test] == [1, 0, 0, 1, 1]
  truth = os.path.join(str(mvtec), 'nut', 'ground_truth')
  assert [r.mask for r in dataset.test] == [
    os.path.join(truth, 'dent', '000.bmp'),
    None,
    None,
    os.path.join(truth, 'scratch', '000_mask.png'),
    os.path.join(truth, 'scratch', '001_mask.png'),
  ]
  assert not warnings


def test_paths_are_absolute(mvtec, monkeypatch):
  monkeypatch.chdir(mvtec.parent)
  for record in layouts.list_mvtec('data', 'nut').test:
    assert os.path.isabs(record.image)
    assert record.mask is None or os.path.isabs(record.mask)


def test_ignores_hidden_and_other_files(mvtec):
  expected = layouts.list_mvtec(mvtec, 'nut')
  good = mvtec / 'nut/train/good'
  (good / '.DS_Store').write_bytes(b'x')
  (good / '._000.png').write_bytes(b'x')
  (good / 'Thumbs.db').write_bytes(b'x')
  (good / 'folder.png').mkdir()
  (mvtec / 'nut/test/.cache').mkdir()
  (mvtec / 'nut/test/readme.txt').write_text('x')
  assert layouts.list_mvtec(mvtec, 'nut') == expected


def test_the_mask_suffix_goes_before_the_plain_name(mvtec):
  layout_helpers.save(
    mvtec / 'nut/ground_truth/dent/000_mask.png', layout_helpers.mask()
  )
  dent = layouts.list_mvtec(mvtec, 'nut').test[0]
  assert dent.mask.endswith('000_mask.png')


@pytest.mark.parametrize('suffix', files.SUFFIXES)
def test_every_suffix_is_listed_and_read(mvtec, suffix):
  path = mvtec / f'nut/train/good/zz{suffix.upper()}'
  Image.fromarray(np.full((12, 16, 3), 77, np.uint8)).save(path)
  record = layouts.list_mvtec(mvtec, 'nut').train[-1]
  assert record.image == str(path)
  image = images_lib.read_image(record.image, None)
  np.testing.assert_allclose(image, 77, atol=2)


def test_names_with_spaces_and_unicode(tmp_path):
  category = tmp_path / 'mes données' / 'vis à tête 螺丝'
  layout_helpers.save(
    category / 'train/good/image n° 1.png', layout_helpers.picture()
  )
  layout_helpers.save(
    category / 'test/défaut grave/été 1.png', layout_helpers.picture()
  )
  layout_helpers.save(
    category / 'ground_truth/défaut grave/été 1_mask.png', layout_helpers.mask()
  )
  dataset = layouts.list_mvtec(category.parent, category.name)
  assert dataset.test[0].defect == 'défaut grave'
  kept = images_lib.validate(dataset.train + dataset.test)
  assert len(kept) == 2
  images, masks = images_lib.load_arrays(kept, 16)
  assert images.any() and masks[1].any()


def test_links_to_files_and_folders(mvtec, tmp_path):
  linked = tmp_path / 'linked'
  (linked / 'nut' / 'train').mkdir(parents=True)
  (linked / 'nut/train/good').symlink_to(mvtec / 'nut/train/good')
  (linked / 'nut/test/good').mkdir(parents=True)
  (linked / 'nut/test/good/a.png').symlink_to(mvtec / 'nut/test/good/000.png')
  dataset = layouts.list_mvtec(linked, 'nut')
  assert len(dataset.train) == 4
  assert len(images_lib.validate(dataset.train + dataset.test)) == 5


def test_a_link_to_nothing_is_a_bad_image(mvtec):
  link = mvtec / 'nut/train/good/999.png'
  link.symlink_to(mvtec / 'gone.png')
  train = layouts.list_mvtec(mvtec, 'nut').train
  assert len(train) == 5
  with pytest.raises(files.BadImageError, match='999.png: no such file'):
    images_lib.validate(train)


def test_root_missing(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    layouts.list_mvtec(tmp_path / 'nowhere', 'nut')
  text = str(error.value)
  assert str(tmp_path / 'nowhere') in text
  assert 'found nothing' in text and '--config.data.root' in text


def test_root_is_a_file(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(files.MissingDataError, match='found a file'):
    layouts.list_mvtec(tmp_path / 'file', 'nut')


def test_category_missing_names_those_there(mvtec):
  layout_helpers.save(mvtec / 'bolt/train/good/0.png', layout_helpers.picture())
  (mvtec / 'notes').mkdir()
  with pytest.raises(FileNotFoundError) as error:
    layouts.list_mvtec(mvtec, 'nuts')
  assert "'nuts'" in str(error.value)
  assert 'The categories there are: bolt, nut.' in str(error.value)
  assert layouts.list_categories(mvtec) == ('bolt', 'nut')


def test_category_missing_among_none(tmp_path):
  (tmp_path / 'images').mkdir()
  with pytest.raises(files.MissingDataError, match='folders found: images'):
    layouts.list_mvtec(tmp_path, 'nut')


@pytest.mark.parametrize('category', ['nut', ''])
def test_root_one_folder_too_deep(mvtec, category):
  with pytest.raises(files.MissingDataError) as error:
    layouts.list_mvtec(mvtec / 'nut', category)
  assert f'set --config.data.root to {mvtec} and' in str(error.value)


def test_train_good_missing(mvtec):
  (mvtec / 'nut/train/good').rename(mvtec / 'nut/train/ok')
  with pytest.raises(FileNotFoundError, match='no folder train/good') as error:
    layouts.list_mvtec(mvtec, 'nut')
  assert 'folders found: ok' in str(error.value)
  assert str(mvtec / 'nut') in str(error.value)


def test_train_good_empty(mvtec):
  for path in (mvtec / 'nut/train/good').iterdir():
    path.unlink()
  with pytest.raises(ValueError, match='no image in train/good .it is empty'):
    layouts.list_mvtec(mvtec, 'nut')
  (mvtec / 'nut/train/good/a.doc').write_bytes(b'x')
  with pytest.raises(ValueError, match='train/good .a.doc.'):
    layouts.list_mvtec(mvtec, 'nut')


def test_defect_image_without_mask(mvtec):
  (mvtec / 'nut/ground_truth/scratch/001_mask.png').unlink()
  with pytest.raises(FileNotFoundError) as error:
    layouts.list_mvtec(mvtec, 'nut')
  text = str(error.value)
  assert str(mvtec / 'nut/test/scratch/001.png') in text
  assert str(mvtec / 'nut/ground_truth/scratch/001_mask.png') in text
  assert str(mvtec / 'nut/ground_truth/scratch/001.png') in text


def test_all_defect_images_without_masks_are_counted(mvtec):
  (mvtec / 'nut/ground_truth').rename(mvtec / 'nut/truth')
  with pytest.raises(FileNotFoundError, match='So do 2 more: scratch/000'):
    layouts.list_mvtec(mvtec, 'nut')


def test_masks_without_images_are_warned_of(mvtec, warnings):
  layout_helpers.save(
    mvtec / 'nut/ground_truth/scratch/777_mask.png', layout_helpers.mask()
  )
  layout_helpers.save(
    mvtec / 'nut/ground_truth/bent/000_mask.png', layout_helpers.mask()
  )
  assert len(layouts.list_mvtec(mvtec, 'nut').test) == 5
  (text,) = warnings
  assert 'bent/000_mask.png, scratch/777_mask.png' in text and ': 2:' in text


def test_a_test_split_without_defects_is_legal(mvtec, warnings):
  for name in ('scratch', 'dent'):
    (mvtec / 'nut/test' / name).rename(mvtec / f'{name}-away')
    (mvtec / 'nut/ground_truth' / name).rename(mvtec / f'{name}-masks')
  dataset = layouts.list_mvtec(mvtec, 'nut')
  assert [r.label for r in dataset.test] == [0, 0]
  assert 'only good images' in warnings[0] and 'NaN' in warnings[0]


def test_no_test_split_is_legal(mvtec, warnings):
  (mvtec / 'nut/test').rename(mvtec / 'test-away')
  (mvtec / 'nut/ground_truth').rename(mvtec / 'truth-away')
  assert layouts.list_mvtec(mvtec, 'nut').test == ()
  assert 'nothing to evaluate' in warnings[0]


DATA = os.environ.get('DMDD_TEST_DATA')
needs_data = pytest.mark.skipif(
  not DATA, reason='DMDD_TEST_DATA, the folder of real images, is not set'
)


@needs_data
@pytest.mark.parametrize(
  ('category', 'counts'),
  [('screw', (320, 41, 119)), ('toothbrush', (48, 12, 30))],
)
def test_real_counts(category, counts, warnings):
  dataset = layouts.list_mvtec(os.path.join(DATA, 'mvtec'), category)
  labels = [record.label for record in dataset.test]
  assert (len(dataset.train), labels.count(0), labels.count(1)) == counts
  assert not warnings
  assert images_lib.validate(dataset.test) == dataset.test
  _, masks = images_lib.load_arrays(dataset.test, 64)
  assert masks.max(axis=(1, 2, 3)).tolist() == labels


@pytest.mark.parametrize('end', ['_gt', '_GT', '_label', '_seg'])
def test_masks_with_other_common_names(root, mvtec, end):
  for name in ('000', '001'):
    old = mvtec / f'nut/ground_truth/scratch/{name}_mask.png'
    old.rename(old.with_name(f'{name}{end}.png'))
  masks = [
    record.mask
    for record in layouts.list_mvtec(mvtec, 'nut').test
    if record.defect == 'scratch'
  ]
  assert [os.path.basename(m) for m in masks] == [
    f'000{end}.png',
    f'001{end}.png',
  ]
  assert not check.check_category(mvtec, 'nut').faults
  (root / 'truth/b.png').rename(root / f'truth/b{end}.png')
  data = _data(root, defect='bad', masks='truth')
  assert all(r.mask for r in layouts.list_dataset(data).test if r.label)
