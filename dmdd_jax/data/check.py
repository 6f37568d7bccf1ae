"""Finds the faults of a category of images before a training does.

The layout is MVTec AD's. Unlike `layouts`, which stops at the first fault, this
reads all files and reports every fault in one line that names the file.

Synopsis:

  report = check.check_category('data/mvtec', 'screw')
  print(check.format_report(report))
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import os
import typing

import numpy as np
from PIL import Image

from dmdd_jax.data import files
from dmdd_jax.data import foreground
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import textures as textures_lib

if typing.TYPE_CHECKING:  # It needs TensorFlow, which only the sheet does.
  from dmdd_jax.data import synthesis as synthesis_lib

# A mask with fewer pixels or a smaller share of them is nearly empty: a slip of
# the pen, or a defect too small for metrics at 256 pixels.
_MIN_PIXELS, _MIN_SHARE = 4, 2e-5


@dataclasses.dataclass(frozen=True)
class Report:
  """The content of a category's folder and its faults.

  Attributes:
    folder: the folder's absolute path.
    counts: {'train/good': images, 'test/DEFECT': images}.
    sizes: {(width, height): images}.
    areas: smallest, median and largest share of the image that a mask covers,
      in [0, 1]; NaN without masks.
    repeated: number of images equal to another image of their folder.
    dark: the warning about 16-bit images that are read as nearly black; '' if
      there are none.
    ignored: paths of files among the images that are none.
    faults: one line each, 'FILE: fault'.
  """

  folder: str
  counts: Mapping[str, int]
  sizes: Mapping[tuple[int, int], int]
  areas: tuple[float, float, float]
  repeated: int
  dark: str
  ignored: tuple[str, ...]
  faults: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Seen:
  """One decoded file: its size, a hash of its pixels, defect pixels.

  `doubts` are of a mask, `peak` of an image: see `images.mask_doubts`, `.peak`.
  """

  size: tuple[int, int] = (0, 0)
  digest: bytes = b''
  pixels: int = 0
  fault: str = ''
  doubts: tuple[str, ...] = ()
  peak: tuple[int, int] = (0, 0)


def check_category(
  root: str | os.PathLike, category: str, white_level: int = 0
) -> Report:
  """Decodes every image and mask of a category and reports the faults.

  Args:
    root: the folder of the categories.
    category: the name of the category's folder.
    white_level: see `images.read_image`.

  Raises:
    MissingDataError: there is no such folder.
  """
  folder = os.path.join(files.absolute(root), category)
  if not category or not os.path.isdir(folder):
    known = (
      files.folders(os.path.dirname(folder)) if os.path.isdir(root) else ()
    )
    raise files.MissingDataError(
      f'there is no category folder {folder}; --root holds'
      f' {", ".join(known) or "no folders"}'
    )
  images = {
    name: files.images(os.path.join(folder, name))
    for split in ('train', 'test')
    for name in _below(folder, split)
  }
  masks = {
    name: files.images(os.path.join(folder, name))
    for name in _below(folder, 'ground_truth')
  }
  seen = _decode([p for paths in images.values() for p in paths], _see_image)
  drawn = _decode([p for paths in masks.values() for p in paths], _see_mask)
  pairs, faults = _pair(images, masks)
  faults += _layout_faults(folder, images, masks)
  faults += [s.fault for s in (*seen.values(), *drawn.values()) if s.fault]
  faults += _mask_faults(pairs, seen, drawn)
  twins, repeated = _duplicates(images, seen)
  shares = [
    drawn[m].pixels / np.prod(drawn[m].size)
    for m in pairs
    if drawn[m].digest and not _is_of_good(m)
  ]
  areas = (float('nan'),) * 3
  if shares:
    low, middle, high = np.quantile(shares, (0, 0.5, 1))
    areas = (float(low), float(middle), float(high))
  return Report(
    folder=folder,
    counts={name: len(paths) for name, paths in images.items()},
    sizes=collections.Counter(s.size for s in seen.values() if s.digest),
    areas=areas,
    repeated=repeated,
    dark=images_lib.white_level_doubt(
      (s.peak for s in seen.values()), white_level
    )
    or '',
    ignored=tuple(
      path
      for name in (*images, *masks)
      for path in files.others(os.path.join(folder, name))
    ),
    faults=tuple(sorted(faults + twins)),
  )


def format_report(report: Report) -> str:
  """The report as text: counts, sizes, mask areas, and one line per fault."""
  lines = [report.folder]
  lines += [f'  {name}: {n} images' for name, n in report.counts.items()]
  sizes = sorted(report.sizes.items(), key=lambda item: -item[1])
  named = ', '.join(f'{w}x{h} ({n})' for (w, h), n in sizes[:8])
  more = f' and {len(sizes) - 8} more' if len(sizes) > 8 else ''
  lines.append(f'  sizes (width x height): {named or "none"}{more}')
  if not np.isnan(report.areas[0]):
    low, middle, high = (f'{100 * area:.3g} %' for area in report.areas)
    lines.append(
      f'  masks cover {low} to {high} of their images, median {middle}'
    )
  if report.repeated:
    lines.append(
      f'  {report.repeated} images repeat another one of their folder'
    )
  if report.dark:
    lines.append(f'  {report.dark}')
  if report.ignored:
    lines.append(
      f'  {len(report.ignored)} files are no images and are not read:'
      f' {files.abbreviate(report.ignored)}'
    )
  lines += report.faults
  lines.append(f'{len(report.faults)} faults')
  return '\n'.join(lines)


def write_sheet(
  path: str,
  root: str | os.PathLike,
  category: str,
  options: 'synthesis_lib.Options',
  *,
  textures: str = '',
  seed: int = 0,
  count: int = 16,
  white_level: int = 0,
) -> None:
  """Writes a contact sheet of synthesised pairs: normal, anomalous, mask.

  Args:
    path: an image file to write; its folder is made.
    root: the folder of the categories.
    category: the name of the category's folder.
    options: of the synthesis; `options.image_size` is a picture's side.
    textures: as in `textures.load`.
    seed: of the choice of images and of the anomalies.
    count: of pairs.
    white_level: see `images.read_image`.

  Raises:
    MissingDataError, DatasetError, BadImageError: see `records`.
  """
  from dmdd_jax.data import pipeline  # TensorFlow takes seconds to import.

  # Not `list_mvtec`, which stops at a fault of the test images.
  folder = os.path.join(files.absolute(root), category)
  train = images_lib.validate(
    layouts.list_good(folder), 'skip', white_level=white_level
  )
  size = options.image_size
  fillings = textures_lib.load(textures, size, limit=50, seed=seed)
  few = sorted(train, key=lambda record: files.draw(record.image, seed))
  images, _ = images_lib.load_arrays(few[:count], size, white_level=white_level)
  inside = None
  if options.foreground != 'off':
    inside = foreground.load(
      few[:count], size, options.foreground, white_level=white_level
    )
  pairs = pipeline.train_dataset(
    images,
    fillings,
    options,
    seed=seed,
    batch_size=count,
    total_steps=1,
    foreground=inside,
  )
  batch = next(pairs.as_numpy_iterator())
  mask = np.repeat(batch['mask'], 3, axis=-1)
  strips = np.concatenate([batch['normal'], batch['image'], mask], axis=2)
  columns = 2
  strips = np.pad(strips, [(0, -count % columns), (0, 4), (0, 4), (0, 0)])
  rows = strips.reshape(-1, columns, *strips.shape[1:])
  sheet = np.concatenate(
    [np.concatenate(list(row), axis=1) for row in rows], axis=0
  )
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  Image.fromarray(np.round(sheet * 255.0).astype(np.uint8)).save(path)


def _below(folder: str, split: str) -> list[str]:
  """'SPLIT/NAME' of every folder in a split; of train, train/good alone."""
  path = os.path.join(folder, split)
  names = files.folders(path) if os.path.isdir(path) else ()
  if split == 'train' and records_lib.GOOD in names:
    names = (records_lib.GOOD,)
  return [f'{split}/{name}' for name in names]


def _decode(
  paths: Sequence[str], look: Callable[[str], _Seen]
) -> dict[str, _Seen]:
  """Reads all files in threads; a file that cannot be read is a fault."""

  def safely(path: str) -> _Seen:
    try:
      return look(path)
    except files.BadImageError as error:
      return _Seen(fault=str(error))

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(paths, pool.map(safely, paths)))


def _see_image(path: str) -> _Seen:
  pixels = images_lib.read_image(path, None)
  digest = hashlib.blake2b(pixels.tobytes(), digest_size=16)
  digest.update(repr(pixels.shape).encode())
  size = (pixels.shape[1], pixels.shape[0])
  return _Seen(size, digest.digest(), peak=images_lib.peak(path))


def _see_mask(path: str) -> _Seen:
  mask = images_lib.read_mask(path, None)
  size = (mask.shape[1], mask.shape[0])
  # An empty one is a fault of its own, and worded there.
  doubts = images_lib.mask_doubts(path) if mask.any() else ()
  return _Seen(size, b'mask', int(np.count_nonzero(mask)), doubts=doubts)


def _pair(
  images: Mapping[str, Sequence[str]], masks: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], list[str]]:
  """{mask: image}, and the faults of masks and images without the other."""
  pairs, faults = {}, []
  for name, paths in images.items():
    split, defect = name.split('/')
    if split != 'test':
      continue
    of_defect = reversed(masks.get(f'ground_truth/{defect}', ()))
    known = {files.stem(path): path for path in of_defect}  # As `by_stem` does.
    for path in paths:
      mask = records_lib.find_mask(path, known)
      if mask is None and defect == records_lib.GOOD:
        continue  # It needs none.
      if mask is None:
        faults.append(f'{path}: there is no mask of this image')
      else:
        pairs[mask] = path
  for path in (p for paths in masks.values() for p in paths):
    if path not in pairs:
      faults.append(f'{path}: there is no image of this mask')
  return pairs, faults


def _layout_faults(
  folder: str,
  images: Mapping[str, Sequence[str]],
  masks: Mapping[str, Sequence[str]],
) -> list[str]:
  """Missing and empty folders, and files and folders that are not read."""
  faults = []
  if 'train/good' not in images:
    faults.append(f'{os.path.join(folder, "train/good")}: there is no folder')
  for name, paths in images.items():
    if not paths:
      faults.append(f'{os.path.join(folder, name)}: there is no image in it')
  train = os.path.join(folder, 'train')
  stray = [
    os.path.join(train, name)
    for name in (files.folders(train) if os.path.isdir(train) else ())
    if name != records_lib.GOOD
  ]
  for name in (*images, *masks):
    path = os.path.join(folder, name)
    stray += [os.path.join(path, inner) for inner in files.folders(path)]
  faults += [f'{path}: nothing reads this folder' for path in stray]
  for split in ('train', 'test', 'ground_truth'):
    path = os.path.join(folder, split)
    for image in files.images(path) if os.path.isdir(path) else ():
      faults.append(f'{image}: nothing reads this file, which is in no folder')
  return faults


def _mask_faults(
  pairs: Mapping[str, str],
  seen: Mapping[str, _Seen],
  drawn: Mapping[str, _Seen],
) -> list[str]:
  """Masks of another size than their image, and nearly empty ones."""
  faults = []
  for mask, image in pairs.items():
    defect, whole = drawn[mask], seen[image]
    if defect.fault:
      continue
    if not whole.fault and defect.size != whole.size:
      faults.append(
        f'{mask}: the mask is {defect.size[0]}x{defect.size[1]}, its image'
        f' {whole.size[0]}x{whole.size[1]}'
      )
    if _is_of_good(mask):
      if defect.pixels:
        faults.append(
          f'{mask}: the mask of a good image has {defect.pixels} defect pixels'
        )
      continue
    faults += defect.doubts
    floor = max(_MIN_PIXELS, _MIN_SHARE * np.prod(defect.size))
    if defect.pixels < floor:
      empty = 'empty' if not defect.pixels else 'nearly empty'
      faults.append(f'{mask}: the mask is {empty} ({defect.pixels} pixels)')
  return faults


def _is_of_good(mask: str) -> bool:
  return os.path.basename(os.path.dirname(mask)) == records_lib.GOOD


def _duplicates(
  images: Mapping[str, Iterable[str]], seen: Mapping[str, _Seen]
) -> tuple[list[str], int]:
  """Faults of images that are in two folders, and the number of images that
  repeat another one of their own folder.
  """
  places = collections.defaultdict(list)
  for name, paths in images.items():
    for path in paths:
      if seen[path].digest:
        places[seen[path].digest].append((name, path))
  faults, repeated = [], 0
  for same in places.values():
    first_name, first = same[0]
    for name, path in same[1:]:
      if name == first_name:
        repeated += 1
      else:
        faults.append(f'{path}: the same image as {first}, pixel by pixel')
  return faults, repeated
