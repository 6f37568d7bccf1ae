"""The figures of each image and of each defect, to see where a mean is lost.

Synopsis:

  pixels = region.prepare(maps, masks)
  for row in details.defects(pixels): ...
  for row in details.images(pixels, labels): ...
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dmdd_jax.metrics import aupimo as aupimo_lib
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results
from dmdd_jax.metrics import store as store_lib


def images(
  pixels: region.Pixels,
  labels: npt.ArrayLike,
  defect_rows: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
  """A row for each image.

  Args:
    pixels: `region.prepare` of N maps and masks.
    labels: (N,) in {0, 1}; AUPIMO's normal images are those of label 0.
    defect_rows: of `defects`, whose AU-PRO is averaged over an image's regions.

  Returns:
    N rows: `highest`, the highest score of the map; `defects`, the number of
    regions; `aupimo`, `pro_per_image` (both as `results.compute` averages them)
    and the columns of AU-PRO. What is not defined for the image is NaN.

  Raises:
    ValueError: on labels that are not 0 and 1.
  """
  normal = store_lib.check_labels(labels) == 0
  aupimo = aupimo_lib.aupimo(pixels, normal=normal)
  pro = region.pro_per_image(pixels)
  by_image: dict[int, list[dict[str, Any]]] = {}
  for row in defect_rows:
    by_image.setdefault(row['image'], []).append(row)
  columns = [name for name in (defect_rows or [{}])[0] if 'au_pro' in name]
  rows = []
  for index, areas in enumerate(pixels.areas):
    row = {
      'highest': float(pixels.read(index).max()),
      'defects': len(areas),
      'aupimo': float(aupimo[index]),
      'pro_per_image': float(pro[index]),
    }
    for name in columns:
      values = [each[name] for each in by_image.get(index, ())]
      row[name] = float(np.mean(values)) if values else float('nan')
    rows.append(row)
  return rows


def defects(
  pixels: region.Pixels, limits: Sequence[float] = (0.3, 0.05)
) -> list[dict[str, Any]]:
  """A row for each 8-connected region of the masks.

  A region's AU-PRO is the area under its own overlap over the false-positive
  rate of all images, as in `region.au_pro`: the mean of the rows is AU-PRO.

  Args:
    pixels: `region.prepare` of N maps and masks.
    limits: FPR limits in (0, 1].

  Returns:
    Rows by image and region: `image`, its index; `region`, from 1; `area` in
    pixels; the box `top`, `left`, `bottom`, `right` (the last two are beyond
    it); `highest`, the highest score inside; a key of AU-PRO for each limit, as
    in `results.compute`, NaN without anomaly-free pixels.

  Raises:
    ValueError: on a limit outside (0, 1].
  """
  parts, rows = [], []
  for index in np.flatnonzero(pixels.defective).tolist():
    scores, regions = pixels.read_regions(index)
    hit = np.flatnonzero(regions)
    hit = hit[np.lexsort((scores[hit], regions[hit]))]
    areas = pixels.areas[index]
    split = np.split(scores[hit], np.cumsum(areas)[:-1])
    boxes = ndimage.find_objects(pixels.regions[index].astype(np.int64))
    top, left = pixels.corners[index]
    for number, (inside, box) in enumerate(zip(split, boxes, strict=True), 1):
      parts.append(np.unique(inside, return_counts=True))
      rows.append(
        {
          'image': index,
          'region': number,
          'area': len(inside),
          'top': top + box[0].start,
          'left': left + box[1].start,
          'bottom': top + box[0].stop,
          'right': left + box[1].stop,
          'highest': float(inside[-1]),
        }
      )
  names = [results.pro_key(limit) for limit in limits]
  for row, values in zip(rows, _au_pro(pixels, parts, limits), strict=True):
    row.update(zip(names, values, strict=True))
  return rows


def _au_pro(
  pixels: region.Pixels,
  parts: Sequence[tuple[np.ndarray, np.ndarray]],
  limits: Sequence[float],
) -> list[list[float]]:
  """AU-PRO of each region at each limit.

  Args:
    pixels: of all images.
    parts: of each region its distinct scores, ascending, and their counts.
    limits: FPR limits.
  """
  sums = [region.ProSums(limits, pixels.negatives) for _ in parts]
  for block in pixels.steps() if parts else ():
    for (scores, counts), total in zip(parts, sums, strict=True):
      first = np.searchsorted(scores, block.score[-1])
      last = np.searchsorted(scores, block.score[0], 'right')
      own, hits = scores[first:last], counts[first:last]
      if len(own):
        at = len(block.score) - 1 - np.searchsorted(block.score[::-1], own)
        total.add(
          ranking.Steps(
            own, hits, hits / counts.sum(), block.above[at], block.upto[at]
          )
        )
  return [total.result() for total in sums]
