"""Anomaly maps as files, one per image: this package's and other programs'.

This package writes float32 TIFF or npy in the layout of MVTec's own evaluation
code: the map of the data set's test/DEFECT/ID.png is
ROOT/CATEGORY/test/DEFECT/ID.tiff (or .npy). Images of one defect in several
folders keep those: test/DEFECT/day1/ID.tiff. It reads that, and maps that lie
as the images do, in floating point of any kind. During an evaluation
`metrics.store` keeps maps instead, in memory and a temporary file.

Synopsis:

  stems = maps.map_paths('out', 'screw', records)
  maps.write_map(f'{stems[0]}.tiff', anomaly_map)
  paths, unused = maps.find_maps('out', 'data/mvtec', 'screw', records)
  anomaly_map = maps.fit_map(path, maps.read_map(path), (1024, 1024))
"""

import collections
from collections.abc import Sequence
import os

import numpy as np
from PIL import Image
import tifffile

from dmdd_jax import storage
from dmdd_jax.data import files
from dmdd_jax.data import records as records_lib

SUFFIXES = ('.tiff', '.tif', '.npy')


class BadMapError(ValueError):
  """A map is missing or cannot be used; the message names the file."""


def map_paths(
  root: str | os.PathLike,
  category: str,
  records: Sequence[records_lib.Record],
) -> list[str]:
  """The paths of the test images' maps, without their suffixes; none twice.

  The images of a defect keep the folders below the one that holds all of them.
  Two that differ in their suffixes alone keep these: ID.png.tiff, ID.jpg.tiff.
  """
  folders: dict[str, list[str]] = {}
  for record in records:
    folders.setdefault(record.defect, []).append(os.path.dirname(record.image))
  names = []
  for record in records:
    common = os.path.commonpath(folders[record.defect])
    name = os.path.relpath(record.image, common)
    names.append(os.path.join(record.defect, name))
  stems = [os.path.splitext(name)[0] for name in names]
  count = collections.Counter(stems)
  return [
    os.path.join(root, category, 'test', stem if count[stem] == 1 else name)
    for name, stem in zip(names, stems)
  ]


def write_map(path: str, anomaly_map: np.ndarray) -> None:
  """Writes a map (H, W) as float32 to .npy or .tiff; makes the folder."""
  values = np.ascontiguousarray(anomaly_map, np.float32)
  with storage.writing(path) as file:
    if path.endswith('.npy'):
      np.save(file, values)
    else:
      Image.fromarray(values).save(file, 'TIFF')


def find_root(root: str, layout: str, categories: Sequence[str]) -> str:
  """The folder in which the maps of a data set begin.

  It is `root` itself, or what other programs make in the folder that they are
  given: `anomaly_images` (MVTec's benchmark server) or `anomaly_maps/LAYOUT`
  (https://github.com/nelson1425/EfficientAD).

  Args:
    root: the folder of the maps.
    layout: the data set's name in `layouts.NAMES`.
    categories: folders of which at least one must be there.

  Raises:
    BadMapError: none of these folders holds a category.
  """
  places = [
    root,
    os.path.join(root, 'anomaly_images'),
    os.path.join(root, 'anomaly_maps', layout),
  ]
  for place in places:
    if any(os.path.isdir(os.path.join(place, name)) for name in categories):
      return place
  raise BadMapError(
    f'found no folder of a category ({files.abbreviate(categories)}) in'
    f' {", ".join(places)}'
  )


def find_maps(
  root: str,
  data_root: str,
  category: str,
  records: Sequence[records_lib.Record],
) -> tuple[list[str], list[str]]:
  """The map of each image, and the maps that belong to none.

  A map lies below `root` as its image lies below `data_root`, or as `map_paths`
  has it, with one of `SUFFIXES` in any case.

  Args:
    root: the folder of the maps.
    data_root: the folder of the data set.
    category: its name.
    records: N test images.

  Returns:
    N paths in the order of the records, and the other maps in those folders.

  Raises:
    BadMapError: an image has no map or several, or two images have the same.
  """
  mirrored = [_mirrored(root, data_root, record) for record in records]
  written = map_paths(root, category, records)
  stems = [
    {stem for stem in pair if stem}
    for pair in zip(mirrored, written, strict=True)
  ]
  by_stem: dict[str, list[str]] = {}
  for path in sorted(_list_maps(mirrored) | _list_maps(written)):
    by_stem.setdefault(os.path.splitext(path)[0], []).append(path)
  owners: dict[str, str] = {}
  missing: list[set[str]] = []
  for record, places in zip(records, stems, strict=True):
    paths = [path for stem in sorted(places) for path in by_stem.get(stem, ())]
    if len(paths) > 1:
      raise BadMapError(
        f'{record.image} has {len(paths)} maps, {", ".join(paths)}: remove all'
        ' but one'
      )
    if not paths:
      missing.append(places)
    elif paths[0] in owners:
      raise BadMapError(
        f'{paths[0]} would be the map of two images, {owners[paths[0]]} and'
        f' {record.image}'
      )
    else:
      owners[paths[0]] = record.image
  if missing:
    suffixes = f'{{{",".join(SUFFIXES)}}}'
    names = ' or '.join(f'{stem}{suffixes}' for stem in sorted(missing[0]))
    raise BadMapError(
      f'{len(missing)} of {len(records)} test images have no anomaly map, the'
      f' first {names}; every test image needs one'
    )
  listed = [path for paths in by_stem.values() for path in paths]
  return list(owners), sorted(path for path in listed if path not in owners)


def _mirrored(root: str, data_root: str, record: records_lib.Record) -> str:
  """The map's path without suffix; '' for an image not below the data root."""
  image = os.path.relpath(record.image, files.absolute(data_root))
  if image.startswith(os.pardir):
    return ''
  return os.path.join(root, os.path.splitext(image)[0])


def _list_maps(stems: Sequence[str]) -> set[str]:
  """The map files in the folders of these files, and below what they share.

  The folders may be links. Names that start with a dot are no maps: archives
  made on a Mac hold `._000.tiff`.
  """
  places = {os.path.dirname(stem) for stem in stems if stem}
  paths = set()
  for top in (*places, os.path.commonpath(places)) if places else ():
    for folder, _, names in os.walk(top):
      paths |= {
        os.path.join(folder, name)
        for name in names
        if name[0] != '.' and name.lower().endswith(SUFFIXES)
      }
  return paths


def read_map(path: str) -> np.ndarray:
  """Reads a map (H, W) of floating point from .npy or one-channel TIFF.

  Axes of length one before or after the two are dropped. A compressed TIFF is
  decoded by tifffile, or by OpenCV where tifffile lacks the codec.

  Returns:
    float32 or float64, with every value of the file: float16 becomes float32,
    and what is wider than float64 becomes that.

  Raises:
    BadMapError: the file cannot be read, or the map is not two-dimensional, not
      of floating point or not finite. An 8- or 16-bit map has lost its ranking.
  """
  try:
    if path.lower().endswith('.npy'):
      values = np.load(path, allow_pickle=False)
    else:
      values = _read_tiff(path)
  except BadMapError:
    raise
  # tifffile's decoders raise many types on corrupt bytes.
  except Exception as error:
    raise BadMapError(f'{path} cannot be read: {error}') from error
  shape = values.shape
  while values.ndim > 2 and 1 in (values.shape[0], values.shape[-1]):
    values = values[0] if values.shape[0] == 1 else values[..., 0]
  if values.ndim != 2 or values.dtype.kind != 'f':
    raise BadMapError(
      f'{path} holds {values.dtype} of shape {shape}; expected floating point'
      ' of shape (H, W)'
    )
  values = values.astype(
    np.float32 if values.dtype.itemsize <= 4 else np.float64, copy=False
  )
  if not np.isfinite(values).all():
    raise BadMapError(f'{path} holds values that are not finite')
  return values


def _read_tiff(path: str) -> np.ndarray:
  """The one image of a TIFF.

  Raises:
    BadMapError: there are several pages, or no codec decodes them.
  """
  with tifffile.TiffFile(path) as file:
    if len(file.pages) != 1:
      raise BadMapError(
        f'{path} has {len(file.pages)} pages; expected one map a file'
      )
    dtype = file.pages.first.dtype
    try:
      return file.asarray()
    except ValueError as error:
      if 'imagecodecs' not in str(error):
        raise
      missing = error
  import cv2  # Takes as long to import as all the rest, and is seldom needed.

  values = None
  if dtype != np.float16:  # Which OpenCV does not know.
    values = cv2.imread(path, cv2.IMREAD_UNCHANGED)
  if values is None or values.dtype != dtype:
    raise BadMapError(
      f'{path} cannot be read: {missing}. Install it, or write the maps without'
      ' compression'
    )
  return values


def fit_map(
  path: str, anomaly_map: np.ndarray, size: tuple[int, int], resize: bool
) -> np.ndarray:
  """A map at its image's size.

  Args:
    path: of the map, for the message.
    anomaly_map: (h, w).
    size: (H, W) of the image.
    resize: whether a map of another size is resized, by `resize_map`.

  Returns:
    (H, W), the map itself where the sizes agree.

  Raises:
    BadMapError: the sizes differ and `resize` is false; or one is upright and
      the other wide, which no resizing mends.
  """
  if anomaly_map.shape == tuple(size):
    return anomaly_map
  height, width = anomaly_map.shape
  message = (
    f'{path} is {height} x {width} (height x width) and its image'
    f' {size[0]} x {size[1]}'
  )
  if (height - width) * (size[0] - size[1]) < 0:
    raise BadMapError(
      f'{message}: the map seems transposed; write it with the height first'
    )
  if not resize:
    raise BadMapError(
      f'{message}: write maps of the same size, or pass --resize to have them'
      ' resized (bilinear)'
    )
  return resize_map(anomaly_map, size)


def resize_map(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes a map (H, W) to `size`, bilinear, half-pixel centres.

  No filter is applied when shrinking. Beyond the outermost pixel centres the
  value of the edge is repeated. float64 stays float64; else it is float32.
  """
  values = np.asarray(anomaly_map)
  if values.dtype != np.float64:
    values = values.astype(np.float32, copy=False)
  for axis, length in enumerate(size):
    count = values.shape[axis]
    if count == length:
      continue
    at = (np.arange(length) + 0.5) * (count / length) - 0.5
    at = np.clip(at, 0.0, count - 1.0)
    low = np.minimum(at.astype(np.int64), max(count - 2, 0))
    high = np.minimum(low + 1, count - 1)
    weight = (at - low).astype(values.dtype)
    weight = weight[:, None] if axis == 0 else weight
    below, values = np.take(values, low, axis), np.take(values, high, axis)
    # In place: a map of 100 megapixels has 400 MB.
    values -= below
    values *= weight
    values += below
  return values


def top_mean(anomaly_map: np.ndarray, pixels: int) -> float:
  """The image score: the mean of the `pixels` highest values of a map."""
  flat = np.ravel(anomaly_map)
  pixels = min(pixels, flat.size)
  highest = np.partition(flat, flat.size - pixels)[-pixels:]
  return float(highest.mean(dtype=np.float64))
