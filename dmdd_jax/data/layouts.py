"""Lists data sets of every known layout, where they are on disk.

'folder' is for your own images: a directory or a glob of normal images, and
optionally of defective images, masks, and normal images for the test. The other
layouts are those of public sets as their archives unpack. Nothing is copied or
renamed.

Synopsis:

  dataset = layouts.list_dataset(config.data)
"""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import os
from typing import Any

from absl import logging

from dmdd_jax.data import files
from dmdd_jax.data import folder as folder_lib
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import records as records_lib

MVTEC_AD, FOLDER = 'mvtec_ad', 'folder'
# Sets without categories: their one category has the name of the set.
KOLEKTOR, MAGNETIC_TILE = 'kolektorsdd2', 'magnetic_tile'
CATEGORIES = {
  # Other folders in this layout may have other categories.
  MVTEC_AD: (
    'bottle',
    'cable',
    'capsule',
    'carpet',
    'grid',
    'hazelnut',
    'leather',
    'metal_nut',
    'pill',
    'screw',
    'tile',
    'toothbrush',
    'transistor',
    'wood',
    'zipper',
  ),
  'mvtec_loco': (
    'breakfast_box',
    'juice_bottle',
    'pushpins',
    'screw_bag',
    'splicing_connectors',
  ),
  'mvtec_ad_2': (
    'can',
    'fabric',
    'fruit_jelly',
    'rice',
    'sheet_metal',
    'vial',
    'wallplugs',
    'walnuts',
  ),
  'visa': (
    'candle',
    'capsules',
    'cashew',
    'chewinggum',
    'fryum',
    'macaroni1',
    'macaroni2',
    'pcb1',
    'pcb2',
    'pcb3',
    'pcb4',
    'pipe_fryum',
  ),
  'btad': ('01', '02', '03'),
  'mpdd': (
    'bracket_black',
    'bracket_brown',
    'bracket_white',
    'connector',
    'metal_plate',
    'tubes',
  ),
  KOLEKTOR: (KOLEKTOR,),
  MAGNETIC_TILE: (MAGNETIC_TILE,),
}
NAMES = (*CATEGORIES, FOLDER)


def list_dataset(
  data: Mapping[str, Any], with_train: bool = True
) -> records_lib.Dataset:
  """Lists the data set that `config.data` names.

  Args:
    data: `name` is one of `NAMES`; the fields that a layout reads are described
      in configs/default.py.
    with_train: whether training images are needed. Without, they may be missing
      on disk and the data set has none.

  Raises:
    MissingDataError, DatasetError: there is no usable data set.
    ValueError: `name` is no known layout.
  """
  if data['name'] not in NAMES:
    raise ValueError(
      f'config.data.name is {data["name"]!r}; choose from {", ".join(NAMES)}'
    )
  try:
    return _list_layout(data, with_train)
  except files.MissingDataError as error:
    raise files.MissingDataError(f'{error}{_relative_to(data)}') from None


def _relative_to(data: Mapping[str, Any]) -> str:
  """What the relative paths of the data are relative to; '' without any."""
  root, notes = data['root'], []
  if data['name'] == FOLDER:
    start = f'config.data.root = {root!r}' if root else 'the working directory'
    notes = [
      f'config.data.{name} = {data[name]!r} is relative to {start}'
      for name in ('normal', 'defect', 'masks', 'test_normal')
      if _is_relative(data[name])
    ]
  if _is_relative(root):
    notes.append(
      f'config.data.root = {root!r} is relative to the working directory'
    )
  if not notes:
    return ''
  return f' ({"; ".join(notes)}; the working directory is {os.getcwd()})'


def _is_relative(path: str) -> bool:
  return bool(path) and not os.path.isabs(os.path.expanduser(path))


def _list_layout(
  data: Mapping[str, Any], with_train: bool
) -> records_lib.Dataset:
  """See `list_dataset`; messages name absolute paths."""
  name = data['name']
  if name == FOLDER:
    return folder_lib.list_folder(data, with_train)
  if not data['root']:
    raise files.MissingDataError(
      'no data: set --config.data.root to the folder that holds the categories'
    )
  root, category = files.absolute(data['root']), data['category']
  if name in (MVTEC_AD, 'mpdd'):
    return list_mvtec(root, category, with_train)
  if category not in CATEGORIES[name]:
    raise files.MissingDataError(
      f'config.data.category is {category!r}; {name} has'
      f' {", ".join(CATEGORIES[name])}'
    )
  if name == 'visa':
    return _list_visa(root, category, with_train)
  if name == KOLEKTOR:
    return _list_kolektor(root, with_train)
  if name == MAGNETIC_TILE:
    dataset = _list_magnetic_tile(root, data)
    return dataset if with_train else dataclasses.replace(dataset, train=())
  if name == 'mvtec_ad_2':
    return _list_mvtec_ad_2(root, category, with_train)
  good = 'ok' if name == 'btad' else records_lib.GOOD
  return _list_like_mvtec(root, category, good, with_train)


def _images(folder: str) -> tuple[str, ...]:
  """The images of a folder.

  Raises:
    MissingDataError: there is no such folder.
    DatasetError: it has no image.
  """
  if not os.path.isdir(folder):
    raise files.MissingDataError(
      f'found no folder {folder}: set --config.data.root to where the set was'
      ' unpacked'
    )
  paths = files.images(folder)
  if not paths:
    raise files.DatasetError(f'found no image in {folder}')
  return paths


def _defect(
  image: str, masks: Mapping[str, str], defect: str
) -> records_lib.Record:
  """A record with the mask ID_mask, ID or another of `records.mask_names`.

  Raises:
    MissingDataError: there is none.
  """
  if mask := records_lib.find_mask(image, masks):
    return records_lib.Record(image, mask, 1, defect)
  raise files.MissingDataError(f'found no mask of the defective image {image}')


def _good(folder: str) -> tuple[records_lib.Record, ...]:
  """The images of a folder as records of good ones; raises as `_images`."""
  return tuple(records_lib.good(path) for path in _images(folder))


def _list_like_mvtec(
  root: str, category: str, good: str, with_train: bool
) -> records_lib.Dataset:
  """BTAD (good images in `ok`) and MVTec LOCO (a folder of masks an image)."""
  folder = os.path.join(root, category)
  train = _good(os.path.join(folder, 'train', good)) if with_train else ()
  test_root = os.path.join(folder, 'test')
  test = []
  for defect in files.folders(test_root) if os.path.isdir(test_root) else ():
    images = files.images(os.path.join(test_root, defect))
    if defect == good:
      test += [records_lib.good(path) for path in images]
      continue
    truth = os.path.join(folder, 'ground_truth', defect)
    masks = files.by_stem(truth)
    for name in files.folders(truth) if os.path.isdir(truth) else ():
      masks[name] = os.path.join(truth, name)
    test += [_defect(path, masks, defect) for path in images]
  return records_lib.Dataset(category, train, tuple(test))


def _list_mvtec_ad_2(
  root: str, category: str, with_train: bool
) -> records_lib.Dataset:
  """MVTec AD 2: the test is `test_public`, whose masks lie inside it.

  `test_private` and `test_private_mixed` have neither labels nor masks, and
  `validation/good` is not read. The names are those of MVTec's own reader of
  the set (MVTecAD2_public_code_utils, mvtec_ad_2_public_offline.py).
  """
  folder = os.path.join(root, category)
  train: tuple[records_lib.Record, ...] = ()
  if with_train:
    train = _good(os.path.join(folder, 'train', records_lib.GOOD))
  public = os.path.join(folder, 'test_public')
  masks = files.by_stem(os.path.join(public, 'ground_truth', 'bad'))
  bad = _images(os.path.join(public, 'bad'))
  test = [_defect(path, masks, 'bad') for path in bad]
  good = _good(os.path.join(public, records_lib.GOOD))
  return records_lib.Dataset(category, train, (*test, *good))


def _list_visa(
  root: str, category: str, with_train: bool
) -> records_lib.Dataset:
  """VisA by its own one-class split, split_csv/1cls.csv."""
  path = os.path.join(root, 'split_csv', '1cls.csv')
  if not os.path.isfile(path):
    raise files.MissingDataError(
      f'found no file {path}: set --config.data.root to where VisA was unpacked'
    )
  parts: dict[str, list[records_lib.Record]] = {'train': [], 'test': []}
  with open(path, newline='', encoding='utf-8') as file:
    for row in csv.DictReader(file):
      if row['object'] != category:
        continue
      image = os.path.join(root, *row['image'].split('/'))
      record = records_lib.good(image)
      if row['label'] != 'normal':
        mask = os.path.join(root, *row['mask'].split('/'))
        record = records_lib.Record(image, mask, 1, 'anomaly')
      parts[row['split']].append(record)
  train, test = (
    tuple(sorted(parts[split], key=lambda r: r.image)) for split in parts
  )
  if not train and with_train:
    raise files.DatasetError(f'{path} has no training image: {category}')
  return records_lib.Dataset(category, train if with_train else (), test)


def _list_kolektor(root: str, with_train: bool) -> records_lib.Dataset:
  """KolektorSDD2: an image is defective if its mask ID_GT is not black.

  Defective images of the train folder are dropped: training uses normal images
  alone.
  """
  parts: dict[str, list[records_lib.Record]] = {'train': []}
  for split in ('train', 'test') if with_train else ('test',):
    paths = {files.stem(p): p for p in _images(os.path.join(root, split))}
    records = []
    for stem, path in paths.items():
      if stem.endswith('_GT'):
        continue
      if f'{stem}_GT' not in paths:
        raise files.MissingDataError(f'found no mask of {path}')
      mask = paths[f'{stem}_GT']
      defective = images_lib.read_mask(mask, None).any()
      records.append(
        records_lib.Record(path, mask, 1, records_lib.DEFECT)
        if defective
        else records_lib.good(path)
      )
    parts[split] = records
  train = tuple(record for record in parts['train'] if not record.label)
  if with_train:
    logging.info(
      'KolektorSDD2: %d defective images of train/ are not used',
      len(parts['train']) - len(train),
    )
  return records_lib.Dataset(KOLEKTOR, train, tuple(parts['test']))


def _list_magnetic_tile(
  root: str, data: Mapping[str, Any]
) -> records_lib.Dataset:
  """Magnetic tiles: MT_NAME/Imgs/ID.jpg, masks ID.png beside them.

  The set has no split of its own: a share `test_fraction` of MT_Free, drawn by
  `test_seed`, is used for the test.
  """
  normal, test = [], []
  for name in files.folders(root) if os.path.isdir(root) else ():
    folder = os.path.join(root, name, 'Imgs')
    if not name.startswith('MT_') or not os.path.isdir(folder):
      continue
    paths = _images(folder)
    masks = {files.stem(p): p for p in paths if p.lower().endswith('.png')}
    images = [p for p in paths if not p.lower().endswith('.png')]
    if name == 'MT_Free':
      normal += [records_lib.good(path) for path in images]
    else:
      defect = name.removeprefix('MT_').lower()
      test += [_defect(path, masks, defect) for path in images]
  if not normal:
    raise files.MissingDataError(
      f'found no image in {os.path.join(root, "MT_Free", "Imgs")}: set'
      ' --config.data.root to the folder of MT_Free'
    )
  fraction, seed = data['test_fraction'], data['test_seed']
  train, good = records_lib.split_test(normal, fraction, seed)
  return records_lib.Dataset(MAGNETIC_TILE, tuple(train), tuple(good + test))


def list_categories(root: str | os.PathLike) -> tuple[str, ...]:
  """Returns the sorted names of the folders in root that hold train/good.

  Args:
    root: the folder of the categories.

  Raises:
    MissingDataError: root is missing or no folder.
  """
  root = files.absolute(root)
  if not os.path.isdir(root):
    kind = 'a file' if os.path.exists(root) else 'nothing'
    raise files.MissingDataError(
      f'Data root {root}: found {kind}, expected a folder with one folder per '
      'category (ROOT/CATEGORY/train/good). Set --config.data.root to it.'
    )
  return tuple(
    name
    for name in files.folders(root)
    if os.path.isdir(os.path.join(root, name, 'train', records_lib.GOOD))
  )


def list_mvtec(
  root: str | os.PathLike, category: str, with_train: bool = True
) -> records_lib.Dataset:
  """Lists one category of a folder in the MVTec AD layout.

  Nothing is decoded here, see `images.validate`; `files` says which files are
  images. A test split that is empty or has no defects is legal and logged as a
  warning, and so are masks without an image. The mask of image ID is ID_mask,
  ID or another of `records.mask_names`, with any image suffix.

  Args:
    root: the folder of the categories.
    category: the name of the category's folder.
    with_train: whether to list train/good; without, it may be missing.

  Returns:
    The category, train sorted by file name, test by defect and file name.

  Raises:
    MissingDataError: no root, category or train/good folder (without, no test
      folder), or a defect image without a mask.
    DatasetError: no image in train/good, or a folder that cannot be read.
  """
  root = files.absolute(root)
  train: tuple[records_lib.Record, ...] = ()
  if with_train:
    folder = _category_folder(root, category)
    train = list_good(folder)
  else:
    folder = os.path.join(root, category)
    if not os.path.isdir(os.path.join(folder, 'test')):
      raise files.MissingDataError(f'found no folder {folder}/test')
  test_root = os.path.join(folder, 'test')
  test: list[records_lib.Record] = []
  unmasked: list[records_lib.Record] = []
  defects = files.folders(test_root) if os.path.isdir(test_root) else ()
  for defect in defects:
    images = files.images(os.path.join(test_root, defect))
    if defect == records_lib.GOOD:
      test += map(records_lib.good, images)
      continue
    masks = files.by_stem(os.path.join(folder, 'ground_truth', defect))
    for path in images:
      mask = records_lib.find_mask(path, masks)
      test.append(records_lib.Record(path, mask, 1, defect))
      if mask is None:
        unmasked.append(test[-1])
  if unmasked:
    raise files.MissingDataError(_unmasked_message(folder, unmasked))
  _warn_about_test(folder, test)
  return records_lib.Dataset(category, train, tuple(test))


def _category_folder(root: str, category: str) -> str:
  """Returns the folder of a category.

  Raises:
    MissingDataError: there is none; the message lists the categories.
  """
  categories = list_categories(root)
  folder = os.path.join(root, category)
  if category and os.path.isdir(folder):
    return folder
  if categories:
    hint = f'The categories there are: {", ".join(categories)}.'
  elif os.path.isdir(os.path.join(root, 'train', records_lib.GOOD)):
    hint = (
      f'This folder is itself a category: set --config.data.root to '
      f'{os.path.dirname(root)} and the category to {os.path.basename(root)}.'
    )
  else:
    names = ', '.join(files.folders(root)[:20]) or 'none'
    hint = (
      'No folder there holds train/good (folders found: '
      f'{names}). Set --config.data.root to the folder of the categories.'
    )
  raise files.MissingDataError(
    f'Data root {root}: found no category {category!r}, expected the folder '
    f'{folder} with train/good. {hint}'
  )


def list_good(folder: str) -> tuple[records_lib.Record, ...]:
  """Lists train/good of the folder of a category in the MVTec AD layout.

  Raises:
    MissingDataError: there is no such folder.
    DatasetError: it holds no image.
  """
  good = os.path.join(folder, 'train', records_lib.GOOD)
  expected = (
    f'expected defect-free training images ({", ".join(files.FORMATS)})'
    f' directly in {good}'
  )
  if not os.path.isdir(good):
    train = os.path.join(folder, 'train')
    names = files.folders(train if os.path.isdir(train) else folder)
    raise files.MissingDataError(
      f'Category {folder}: found no folder train/good (folders found: '
      f'{", ".join(names[:20]) or "none"}), {expected}. Move them there, or '
      'choose another category or --config.data.root.'
    )
  images = files.images(good)
  if not images:
    others = [name for name in sorted(os.listdir(good)) if name[0] != '.']
    raise files.DatasetError(
      f'Category {folder}: found no image in train/good '
      f'({files.abbreviate(others) or "it is empty"}), {expected}. Copy them '
      'there, or choose another category or --config.data.root.'
    )
  return tuple(
    records_lib.Record(path, None, 0, records_lib.GOOD) for path in images
  )


def _unmasked_message(
  folder: str, unmasked: Sequence[records_lib.Record]
) -> str:
  """Returns the error text for defect images that have no mask."""
  first = unmasked[0]
  masks = os.path.join(folder, 'ground_truth', first.defect)
  stem = files.stem(first.image)
  more = ''
  if len(unmasked) > 1:
    others = [f'{r.defect}/{os.path.basename(r.image)}' for r in unmasked[1:]]
    more = f' So do {len(others)} more: {files.abbreviate(others)}.'
  return (
    f'Defect image {first.image}: found no mask, expected '
    f'{os.path.join(masks, stem)}_mask.png or {os.path.join(masks, stem)}.png '
    '(or ID_gt, ID_label, ID_seg, mask_ID, with any suffix of an image).'
    f'{more} Add the masks, or move the images out of test/.'
  )


def _warn_about_test(folder: str, test: Sequence[records_lib.Record]) -> None:
  """Logs warnings about a test split that is legal but unusual."""
  used = {record.mask for record in test}
  truth = os.path.join(folder, 'ground_truth')
  unused = []
  for defect in files.folders(truth) if os.path.isdir(truth) else ():
    if defect != records_lib.GOOD:
      masks = files.images(os.path.join(truth, defect))
      unused += [
        f'{defect}/{os.path.basename(m)}' for m in masks if m not in used
      ]
  if unused:
    logging.warning(
      'Masks in %s without an image in test/, ignored: %d: %s',
      truth,
      len(unused),
      files.abbreviate(unused),
    )
  drawn = _drawn_masks(os.path.join(truth, records_lib.GOOD))
  if drawn:
    logging.warning(
      'Masks of good images that are not black: %d: %s. They are not read: the'
      ' folder decides that an image is good.',
      len(drawn),
      files.abbreviate(drawn),
    )
  labels = {record.label for record in test}
  if not labels:
    logging.warning('%s/test holds no images: nothing to evaluate.', folder)
  elif labels != {0, 1}:
    logging.warning(
      '%s/test holds only %s images: metrics that need both will be NaN.',
      folder,
      'good' if labels == {0} else 'defective',
    )


def _drawn_masks(folder: str) -> list[str]:
  """The masks of a folder that show a defect; [] where it is missing."""
  drawn = []
  for path in files.images(folder) if os.path.isdir(folder) else ():
    try:
      if images_lib.read_mask(path, None).any():
        drawn.append(path)
    except files.BadImageError as error:
      logging.warning('%s', error)
  return drawn
