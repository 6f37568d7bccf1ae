"""MVTec LOCO AD's regions and their saturation areas, for `spro.spro`.

Each mask file of an image is one region, connected or not. The value of its
pixels names an entry of the category's defects_config.json. The rules are those
of MVTec's evaluation code (src/image.py).

Synopsis:

  kinds = loco.read_config('data/loco', 'pushpins')
  for mask, area in loco.read_regions(record, kinds): ...
"""

from collections.abc import Mapping
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from dmdd_jax.data import files
from dmdd_jax.data import records as records_lib

NAME = 'mvtec_loco'
DEFECTS = ('logical_anomalies', 'structural_anomalies')
_FIELDS = {'pixel_value', 'saturation_threshold', 'relative_saturation'}


def read_config(root: str, category: str) -> dict[int, dict[str, Any]]:
  """The entries of a category's defects_config.json by their pixel value.

  Raises:
    MissingDataError: there is no such file.
    DatasetError: it is not a list of entries with the expected fields.
  """
  path = os.path.join(files.absolute(root), category, 'defects_config.json')
  if not os.path.isfile(path):
    raise files.MissingDataError(
      f'found no file {path}: it comes with the set and has the saturation'
      ' areas'
    )
  try:
    with open(path, encoding='utf-8') as file:
      entries = json.load(file)
    if not all(set(entry) >= _FIELDS for entry in entries):
      raise ValueError(f'an entry lacks one of {", ".join(sorted(_FIELDS))}')
  except (TypeError, ValueError) as error:
    raise files.DatasetError(
      f'{path} is no list of defects: {error}'
    ) from error
  return {entry['pixel_value']: entry for entry in entries}


def read_regions(
  record: records_lib.Record, kinds: Mapping[int, Mapping[str, Any]]
) -> list[tuple[np.ndarray, float]]:
  """The regions of an image, in the order of their files; none if it is good.

  Args:
    record: of the image; its mask is a file or a folder of them.
    kinds: of `read_config`.

  Returns:
    Pairs of a mask (H, W) uint8 in {0, 1} and its saturation area in pixels.

  Raises:
    DatasetError: a mask has several values, or a value that is not in `kinds`.
  """
  if record.mask is None:
    return []
  paths: tuple[str, ...] = (record.mask,)
  if os.path.isdir(record.mask):
    paths = files.images(record.mask)
  regions = []
  for path in paths:
    with Image.open(path) as image:
      mask = np.asarray(image)
    values = np.unique(mask[mask > 0]).tolist()
    if len(values) != 1 or values[0] not in kinds:
      raise files.DatasetError(
        f'{path}: found pixel values {values}, expected one of'
        f' {sorted(kinds)}, which defects_config.json has'
      )
    kind = kinds[values[0]]
    area = saturation_area(
      int(np.count_nonzero(mask)),
      kind['saturation_threshold'],
      kind['relative_saturation'],
    )
    regions.append(((mask > 0).astype(np.uint8), area))
  return regions


def saturation_area(pixels: int, threshold: float, relative: bool) -> float:
  """The saturation area of a region, in pixels.

  Args:
    pixels: the region's own area.
    threshold: the entry's `saturation_threshold`.
    relative: the entry's `relative_saturation`: whether the threshold is a
      share of the region's area. Otherwise it is a number of pixels.

  Returns:
    At least one pixel, at most the region's own area.
  """
  return max(1, min(int(threshold * pixels) if relative else threshold, pixels))
