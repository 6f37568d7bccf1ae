"""Regions of a map at or above a threshold: what an answer lists as defects.

numpy alone, because the container for .onnx files has no scipy.

Synopsis:

  for region in regions.find(anomaly_map, threshold=0.5, height=600, width=800):
    print(region.left, region.top, region.area, region.peak)
"""

import dataclasses

import numpy as np

MOST = 100  # Regions that are listed; of noise there are thousands.


@dataclasses.dataclass(frozen=True)
class Region:
  """Neighbouring pixels of a map at or above a threshold; sent as it is.

  Attributes:
    left: of the box around it, in pixels of the image from its left edge.
    top: likewise, from its upper edge.
    width: of the box.
    height: of the box.
    area: pixels of the image.
    peak: highest value of the map within.
  """

  left: float
  top: float
  width: float
  height: float
  area: float
  peak: float


def find(
  values: np.ndarray, threshold: float | None, height: int, width: int
) -> list[Region]:
  """The regions of a map, the highest peak first, at most `MOST`.

  Pixels that touch by a side or a corner are of one region.

  Args:
    values: (S, S) map.
    threshold: pixels at or above it belong to a region; None: there are none.
    height: of the image, in pixels.
    width: likewise.
  """
  if threshold is None:
    return []
  side = len(values)
  rows, columns = np.nonzero(values >= threshold)
  if not len(rows):
    return []
  labels = _label(rows, columns, side)
  names, label = np.unique(labels, return_inverse=True)
  count = len(names)
  left, top = np.full(count, side), np.full(count, side)
  right, bottom = np.zeros(count, int), np.zeros(count, int)
  peak = np.full(count, -np.inf)
  np.minimum.at(left, label, columns)
  np.minimum.at(top, label, rows)
  np.maximum.at(right, label, columns + 1)
  np.maximum.at(bottom, label, rows + 1)
  np.maximum.at(peak, label, values[rows, columns])
  area = np.bincount(label)
  x, y = width / side, height / side
  return [
    Region(
      left=float(left[i] * x),
      top=float(top[i] * y),
      width=float((right[i] - left[i]) * x),
      height=float((bottom[i] - top[i]) * y),
      area=float(area[i] * x * y),
      peak=float(peak[i]),
    )
    for i in np.argsort(-peak, kind='stable')[:MOST]
  ]


def _label(rows: np.ndarray, columns: np.ndarray, side: int) -> np.ndarray:
  """One number for all pixels of a region: its lowest pixel's.

  Every pixel takes the lowest number of its neighbours and then the number of
  the pixel that this number names, until nothing changes.
  """
  grid = np.full((side + 2, side + 2), -1)
  grid[rows + 1, columns + 1] = np.arange(len(rows))
  neighbours = np.stack(
    [
      grid[rows + 1 + down, columns + 1 + across]
      for down in (-1, 0, 1)
      for across in (-1, 0, 1)
    ]
  )
  own = np.arange(len(rows))
  neighbours = np.where(neighbours < 0, own, neighbours)
  labels = own
  while True:
    lowest = labels[neighbours].min(axis=0)
    np.minimum.at(lowest, labels, lowest.copy())  # The region so far follows.
    lowest = lowest[lowest]
    if (lowest == labels).all():
      return labels
    labels = lowest
