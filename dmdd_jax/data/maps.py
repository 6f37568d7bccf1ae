"""Anomaly maps as files: float32 TIFF or npy, one per image.

The layout is that of MVTec's own evaluation code: the map of the data set's
test/DEFECT/ID.png is ROOT/CATEGORY/test/DEFECT/ID.tiff (or .npy). During an
evaluation `metrics.store` keeps maps instead, in memory and a temporary file.
Images of one defect in several folders keep those: test/DEFECT/day1/ID.tiff.

Synopsis:

  stems = maps.map_paths('submission', 'screw', records)
  maps.write_map(stems[0] + '.tiff', anomaly_map)
  anomaly_map = maps.read_map(maps.find_map(stems[0]))
"""

import collections
from collections.abc import Sequence
import os

import numpy as np
from PIL import Image

from dmdd_jax import storage
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


def find_map(stem: str) -> str:
  """The file with this path and one of `SUFFIXES`.

  Raises:
    BadMapError: there is none.
  """
  for suffix in SUFFIXES:
    if os.path.isfile(stem + suffix):
      return stem + suffix
  raise BadMapError(
    f'there is no anomaly map {stem}{{{",".join(SUFFIXES)}}}; every test image'
    ' needs one'
  )


def read_map(path: str) -> np.ndarray:
  """Reads a map (H, W), float32 or float64, from .npy or one-channel TIFF.

  Raises:
    BadMapError: the file cannot be read, or the map is not two-dimensional, not
      of floating point or not finite. An 8- or 16-bit map has lost its ranking.
  """
  try:
    if path.endswith('.npy'):
      values = np.load(path, allow_pickle=False)
    else:
      with Image.open(path) as image:
        values = np.asarray(image)
  except (OSError, ValueError, SyntaxError) as error:
    raise BadMapError(f'{path} cannot be read: {error}') from error
  if values.ndim != 2 or values.dtype.kind != 'f':
    raise BadMapError(
      f'{path} holds {values.dtype} of shape {values.shape}; expected floating'
      ' point of shape (H, W)'
    )
  if not np.isfinite(values).all():
    raise BadMapError(f'{path} holds values that are not finite')
  return values


def resize_map(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes a map (H, W) to float32 of `size`, bilinear, half-pixel centres.

  No filter is applied when shrinking. Beyond the outermost pixel centres the
  value of the edge is repeated.
  """
  values = np.asarray(anomaly_map, np.float32)
  for axis, length in enumerate(size):
    count = values.shape[axis]
    if count == length:
      continue
    at = (np.arange(length) + 0.5) * (count / length) - 0.5
    at = np.clip(at, 0.0, count - 1.0)
    low = np.minimum(at.astype(np.int64), max(count - 2, 0))
    high = np.minimum(low + 1, count - 1)
    weight = (at - low).astype(np.float32)
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
  return float(np.partition(flat, flat.size - pixels)[-pixels:].mean())
