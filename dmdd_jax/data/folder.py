"""Your own images: the layout 'folder'.

A directory, a glob or a list of normal images, and optionally of defective
ones, of masks (a directory), and of normal images for the test.

Synopsis:

  dataset = folder.list_folder(config.data)
"""

from collections.abc import Iterable, Mapping, Sequence
import os
from typing import Any

from absl import logging

from dmdd_jax.data import files
from dmdd_jax.data import records as records_lib


def list_folder(
  data: Mapping[str, Any], with_train: bool = True
) -> records_lib.Dataset:
  """Lists the user's own images.

  Relative paths are below `data.root`, or the working directory. Directories
  are searched with all folders below them. A folder below `data.defect` names
  the kind of defect. A warning names each missing part and the metrics that
  need it.

  Args:
    data: `normal`, `defect`, `masks`, `test_normal`, `test_fraction`,
      `test_seed`, `category` and `root`, as in configs/default.py.
    with_train: whether normal images are needed beside those of the test.

  Returns:
    The data set; a record of a defect has mask None if there is no mask file.

  Raises:
    MissingDataError: a directory is missing, or a glob matches nothing.
    DatasetError: a directory without images, or images that are both normal
      and defective, or both for training and for the test.
  """
  masks_root = _resolve(data, 'masks')
  normal = _find(data, 'normal', masks_root)
  if with_train and not normal:
    raise files.MissingDataError(
      'no normal images: set --config.data.normal to a directory of them, or'
      ' to a glob in quotes'
    )
  defective = _find(data, 'defect', masks_root)
  test_normal = _find(data, 'test_normal', masks_root)
  _check_disjoint('normal', normal, 'defect', defective)
  _check_disjoint('test_normal', test_normal, 'defect', defective)
  _check_disjoint('normal', normal, 'test_normal', test_normal)
  train = [records_lib.good(path) for path in normal]
  test = [records_lib.good(path) for path in test_normal]
  if train and keeps_test(data):
    train, test = records_lib.split_test(
      train, data['test_fraction'], data['test_seed']
    )
  test += _defects(data, defective, masks_root)
  if not defective:
    logging.warning(
      'config.data.defect is not set: there is training and prediction, and'
      ' every metric is null'
    )
  return records_lib.Dataset(data['category'], tuple(train), tuple(test))


def keeps_test(data: Mapping[str, Any]) -> bool:
  """Whether a share of the normal images is kept for the test."""
  return bool(data['defect']) and not data['test_normal']


def _resolve(data: Mapping[str, Any], field: str) -> str:
  """The absolute path or glob of a field; '' where it is not set."""
  if not data[field]:
    return ''
  root = data.get('root') or ''
  return files.absolute(os.path.join(root, os.path.expanduser(data[field])))


def _find(
  data: Mapping[str, Any], field: str, masks_root: str
) -> tuple[str, ...]:
  """The images that a field names; () where it is not set.

  Raises:
    MissingDataError, DatasetError: there is no image; the message names the
      field.
  """
  path = _resolve(data, field)
  if not path:
    return ()
  if os.path.isdir(path):
    paths = files.images_below(path)
    if masks_root and os.path.realpath(masks_root) == os.path.realpath(path):
      raise files.DatasetError(
        f'config.data.{field} and config.data.masks are the same directory,'
        f' {path}: put the masks into a directory of their own'
      )
  else:
    listing = files.list_inputs(path, field=f'config.data.{field}')
    for fault in listing.faults.values():
      raise files.DatasetError(fault)
    paths = listing.images
  masks = os.path.join(masks_root, '') if masks_root else None
  paths = tuple(p for p in paths if not (masks and p.startswith(masks)))
  if not paths:
    raise files.DatasetError(
      f'config.data.{field}: found no image in {path}, expected at least one'
      f' file of {", ".join(files.FORMATS)} (any depth)'
    )
  return paths


def _check_disjoint(
  field: str, paths: Iterable[str], other: str, others: Iterable[str]
) -> None:
  """Raises DatasetError if two fields name the same file."""
  known = {os.path.realpath(path) for path in others}
  both = [path for path in paths if os.path.realpath(path) in known]
  if both:
    raise files.DatasetError(
      f'config.data.{field} and config.data.{other} name the same'
      f' {len(both)} images: {files.abbreviate(both)}. Make them disjoint.'
    )


def _defects(
  data: Mapping[str, Any], paths: Sequence[str], masks_root: str
) -> list[records_lib.Record]:
  """The records of the defective images; mask is None if there is no file."""
  if masks_root and not os.path.isdir(masks_root):
    raise files.MissingDataError(
      f'config.data.masks: found no directory {masks_root}'
    )
  masks = _Masks(masks_root)
  root = _resolve(data, 'defect')
  records = []
  for path in paths:
    parts: tuple[str, ...] = ()
    if os.path.isdir(root):
      folder = os.path.relpath(os.path.dirname(path), root)
      parts = () if folder == '.' else tuple(folder.split(os.sep))
    if records_lib.GOOD in parts:
      raise files.DatasetError(
        f'config.data.defect holds a folder {records_lib.GOOD!r} ({path}):'
        ' name the directory of the defective images alone'
      )
    mask = masks.find(parts, files.stem(path))
    records.append(
      records_lib.Record(path, mask, 1, '_'.join(parts) or records_lib.DEFECT)
    )
  unknown = [record.image for record in records if record.mask is None]
  if unknown:
    logging.warning(
      '%d of %d defective images have no mask (%s): image metrics alone,'
      ' pixel metrics are null',
      len(unknown),
      len(records),
      files.abbreviate(unknown),
    )
  unused = masks.unused(record.mask for record in records)
  if unused:
    logging.warning(
      'Masks without an image, ignored: %d: %s',
      len(unused),
      files.abbreviate(unused),
    )
  return records


class _Masks:
  """The masks of a directory, by folder and stem, or by a unique stem."""

  def __init__(self, root: str):
    """Lists the masks in a directory and below it; none for ''."""
    self._paths = files.images_below(root) if root else ()
    self._by_place: dict[tuple[str, str], str] = {}
    self._by_stem: dict[str, list[str]] = {}
    for path in self._paths:
      stem = files.stem(path)
      folder = os.path.relpath(os.path.dirname(path), root)
      self._by_place[folder, stem] = path
      self._by_stem.setdefault(stem, []).append(path)

  def find(self, parts: tuple[str, ...], stem: str) -> str | None:
    """The mask of an image, see `records.mask_names`; None without one.

    Raises:
      DatasetError: several masks have that name, and none of them is in the
        image's folder.
    """
    folder = os.path.join(*parts) if parts else '.'
    for name in records_lib.mask_names(stem):
      if (folder, name) in self._by_place:
        return self._by_place[folder, name]
      same = self._by_stem.get(name, ())
      if len(same) > 1:
        raise files.DatasetError(
          f'the masks {files.abbreviate(same)} all match the image'
          f' {os.path.join(*parts, stem)}: give masks and images the same'
          ' folders'
        )
      if same:
        return same[0]
    return None

  def unused(self, used: Iterable[str | None]) -> list[str]:
    """The masks that belong to no image."""
    known = set(used)
    return [path for path in self._paths if path not in known]
