"""Images as a caller in Python names them: folders, globs, lists, arrays.

Layouts read folders. So a list becomes a folder of links and of PNG files.

Synopsis:

  paths = inputs.keep(['a/1.png', 'b/1.png'], 'runs/parts/inputs/normal')
  records = inputs.list_test('parts/test', 'parts/ground_truth', 'out/inputs')
"""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import os
import shutil
import tempfile

import numpy as np
from PIL import Image

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import records as records_lib

Path = str | os.PathLike
PATH = (str, os.PathLike)  # For isinstance.
# An array is uint8, (H, W, 3) or (H, W).
Source = Path | np.ndarray
# What `files.list_inputs` takes; or a list of files and arrays.
Sources = Path | Iterable[Source]
# By the kind of defect: folders, or a mask of each image.
Masks = Path | Mapping[str, Path | Sequence[Source]]


def keep(
  images: Iterable[Source], folder: Path, replace: bool = False
) -> list[str]:
  """Makes a folder of images: links to files, and arrays as PNG.

  A link has the path of its file below the folder that all files have in
  common. An array's name is its place in the list and a digest of its pixels.
  The same list again leaves the folder as it is.

  Args:
    images: at least one.
    folder: on a local disk; is made.
    replace: whether other images in it may be removed.

  Returns:
    The absolute paths in the folder, in the order of the list.

  Raises:
    MissingDataError: a file is not there, or the list is empty.
    BadImageError: an array is no image.
    DatasetError: the folder holds other images.
  """
  sources = [
    x if isinstance(x, np.ndarray) else files.absolute(x) for x in images
  ]
  if not sources:
    raise files.MissingDataError('the list of images is empty')
  names = _names(sources)
  content = dict(zip(names, sources))
  folder = files.absolute(folder)
  wanted = {
    k: '' if isinstance(v, np.ndarray) else v for k, v in content.items()
  }
  if os.path.isdir(folder) and _links(folder) != wanted:
    if not replace:
      raise files.DatasetError(
        f'{folder} holds other images than this list: use another workdir, or'
        ' remove that folder and the checkpoints that were trained on it'
      )
    shutil.rmtree(folder)
  if not os.path.isdir(folder):
    _write(content, folder)
  return [os.path.join(folder, name) for name in names]


def list_test(
  images: Path | Mapping[str, Sources],
  masks: Masks | None,
  folder: Path,
) -> list[records_lib.Record]:
  """The records of test images.

  Args:
    images: a folder with the folder `good` and one per kind of defect, as
      MVTec AD's `test`; or {kind: images}.
    masks: a folder with a folder per kind of defect, with ID.png or ID_mask.png
      for the image ID; or {kind: such a folder, or a list}, files or arrays in
      the order of the images, non-zero on defects; or None.
    folder: gets links to what is listed, and arrays as PNG.

  Raises:
    MissingDataError: there is no image, or no file that is named.
    BadImageError: an array is no image.
    DatasetError: there are not as many masks as images.
  """
  if isinstance(images, PATH):
    root = files.absolute(images)
    kinds = files.folders(root) if os.path.isdir(root) else ()
    if not kinds:
      raise files.MissingDataError(
        f'{os.fspath(images)}: holds no folders, expected {records_lib.GOOD}'
        ' and one per kind of defect; or give a dict,'
        f" {{'{records_lib.GOOD}': ..., 'scratch': ...}}"
      )
    images = {kind: os.path.join(root, kind) for kind in kinds}
  if isinstance(masks, Mapping) and (unknown := sorted({*masks} - {*images})):
    raise files.DatasetError(
      f'there are masks of {", ".join(unknown)}, but no such images; the kinds'
      f' of images are {", ".join(images)}'
    )
  records: list[records_lib.Record] = []
  for kind, part in images.items():
    if isinstance(part, PATH):
      listing = files.list_inputs(part, field=kind)
      paths = [files.absolute(path) for path in listing.images]
    else:
      paths = keep(part, os.path.join(folder, kind), replace=True)
    if kind == records_lib.GOOD:
      records += map(records_lib.good, paths)
      continue
    truth: Path | Sequence[Source] | None
    if isinstance(masks, PATH):
      truth = os.path.join(masks, kind)
    else:
      truth = masks.get(kind) if masks else None
    target = os.path.join(folder, f'{kind}_masks')
    records += [
      records_lib.Record(path, mask, 1, kind)
      for path, mask in zip(paths, _masks(truth, kind, paths, target))
    ]
  return records


def _masks(
  masks: Path | Sequence[Source] | None,
  kind: str,
  paths: Sequence[str],
  folder: str,
) -> Sequence[str | None]:
  """The mask of each defective image of a kind; None without one."""
  if masks is None:
    return [None] * len(paths)
  if isinstance(masks, PATH):
    by_stem = files.by_stem(files.absolute(masks))
    return [records_lib.find_mask(path, by_stem) for path in paths]
  if len(masks) != len(paths):
    raise files.DatasetError(
      f'{kind}: {len(masks)} masks for {len(paths)} images; give one for each'
    )
  sources = [
    (m != 0).astype(np.uint8) * 255 if isinstance(m, np.ndarray) else m
    for m in masks
  ]
  return keep(sources, folder, replace=True)


def _names(sources: Sequence[str | np.ndarray]) -> list[str]:
  """The names of images in their folder.

  Raises:
    MissingDataError, BadImageError: see `keep`.
  """
  paths = [x for x in sources if not isinstance(x, np.ndarray)]
  if missing := [path for path in paths if not os.path.isfile(path)]:
    raise files.MissingDataError(
      f'there is no file {files.abbreviate(missing)}; a list holds files and'
      ' arrays, a folder is named by itself'
    )
  parents = [os.path.dirname(path) for path in paths]
  base = os.path.commonpath(parents) if parents else ''
  return [
    f'{index:05d}_{_digest(source)}.png'
    if isinstance(source, np.ndarray)
    else os.path.relpath(source, base)
    for index, source in enumerate(sources)
  ]


def _digest(image: np.ndarray) -> str:
  """Of an array's shape and pixels; BadImageError if it is no image."""
  images_lib.check_array(image)
  content = f'{image.shape}'.encode() + image.tobytes()
  return hashlib.blake2b(content, digest_size=8).hexdigest()


def _links(folder: str) -> dict[str, str]:
  """{name in the folder: where it links to, '' of a file}."""
  links = {}
  for parent, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(parent, name)
      target = os.readlink(path) if os.path.islink(path) else ''
      links[os.path.relpath(path, folder)] = target
  return links


def _write(content: Mapping[str, str | np.ndarray], folder: str) -> None:
  """Makes the folder, which is seen only when all is in it."""
  parent = os.path.dirname(folder)
  os.makedirs(parent, exist_ok=True)
  draft = tempfile.mkdtemp(dir=parent, prefix='.inputs-')
  try:
    for name, source in content.items():
      path = os.path.join(draft, name)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      if isinstance(source, np.ndarray):
        Image.fromarray(source).save(path)
      else:
        os.symlink(source, path)
    os.chmod(draft, 0o755)
    os.rename(draft, folder)
  except BaseException:
    shutil.rmtree(draft)
    raise
