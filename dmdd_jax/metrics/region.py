"""How well regions are outlined: AU-PRO; spro.py and aupimo.py build on it.

Synopsis:

  pro_30, pro_05 = region.au_pro(maps, masks, limits=(0.3, 0.05))
  fpr, pro = region.pro_curve(maps, masks, points=500)

Maps are (N, H, W) or a sequence of N (H_i, W_i) arrays of floats; higher means
more anomalous. Masks have the same shapes, in {0, 1}. Every distinct score is a
threshold. Ties are merged, and nothing is binned.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import store as store_lib

_EIGHT = np.ones((3, 3), int)
# Bytes of region indices kept in memory for maps that are themselves on disk.
_REGION_BYTES = 2**28


class Pixels(NamedTuple):
  """Checked maps and the regions of their masks, for all metrics here.

  Attributes:
    maps: sequence of N finite (H_i, W_i) float arrays.
    regions: sequence of N arrays, empty for an image without defects, else
      (h, w) unsigned, for the smallest box that holds the defects: 0 outside of
      defects, else 1 + the region's index.
    corners: N pairs, the upper and left end of the box in the map.
    areas: N arrays (R_i,) int64 of the pixels of each region.
    sizes: N pixel counts.
  """

  maps: store_lib.Arrays
  regions: store_lib.Arrays
  corners: list[tuple[int, int]]
  areas: list[np.ndarray]
  sizes: list[int]

  @property
  def positives(self) -> int:
    """Defect pixels of all images."""
    return int(sum(area.sum() for area in self.areas))

  @property
  def negatives(self) -> int:
    """Anomaly-free pixels of all images, good ones included."""
    return sum(self.sizes) - self.positives

  @property
  def defective(self) -> np.ndarray:
    """(N,) bool, which images have a defect pixel."""
    return np.array([len(area) > 0 for area in self.areas], bool)

  def read(self, index: int) -> np.ndarray:
    """The (n,) scores of an image."""
    return store_lib.as_float(self.maps[index]).reshape(-1)

  def read_hits(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The defect pixels of an image.

    Returns:
      (p,) their indices among the scores, ascending, and (p,) the indices of
      their regions, in [0, R_i).
    """
    if not len(self.areas[index]):
      none = np.empty(0, np.intp)
      return none, none
    box, (top, left) = self.regions[index], self.corners[index]
    inside = np.flatnonzero(box)
    regions = box.reshape(-1)[inside].astype(np.intp) - 1
    side, width = self.maps[index].shape[1], box.shape[1]
    inside += inside // width * (side - width) + (top * side + left)
    return inside, regions

  def read_regions(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The (n,) scores of an image; (n,) 1 + its region's index, or 0."""
    scores = self.read(index)
    hits, regions = self.read_hits(index)
    indices = np.zeros(len(scores), np.min_scalar_type(len(self.areas[index])))
    indices[hits] = regions + 1
    return scores, indices

  def steps(
    self, weights: Sequence[np.ndarray] | None = None, head: float = 1.0
  ) -> Iterator[ranking.Steps]:
    """`ranking.steps` over the images.

    Args:
      weights: N arrays (R_i,), the weight of a pixel of each region; None
        for 1.
      head: as of `ranking.steps`.
    """

    def read(
      index: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
      hits, regions = self.read_hits(index)
      weight = None if weights is None else weights[index][regions]
      return self.read(index), hits, weight

    block = None
    if isinstance(self.regions, store_lib.ArraySpool):
      block = 2**20
    return ranking.steps(read, self.sizes, block, head)

  def region_weights(self) -> list[np.ndarray]:
    """N arrays (R_i,): with them a cumulative sum over `steps` is the PRO."""
    count = sum(len(area) for area in self.areas)
    return [1.0 / (count * area) for area in self.areas]


Maps = Pixels | store_lib.MapStore | store_lib.Arrays


def prepare(maps: Maps, masks: store_lib.Arrays | None) -> Pixels:
  """Checks maps and masks and labels the regions.

  Args:
    maps: (N, H, W) finite floats or N arrays (H_i, W_i), or a `store.MapStore`
      with masks None. They are read several times, never copied as a whole.
    masks: the same shapes, in {0, 1}; zeros for a good image.

  Returns:
    `Pixels`. All functions of this module also take them as `maps`, so that
    several metrics share the work.

  Raises:
    ValueError: on counts or shapes that disagree, other mask values, maps that
      are not finite; the message names the image's index.
  """
  if isinstance(maps, Pixels):
    return maps
  regions: list[np.ndarray] | store_lib.ArraySpool = []
  if isinstance(maps, store_lib.MapStore):
    regions = store_lib.ArraySpool(
      min(_REGION_BYTES, maps.limit_bytes), maps.directory
    )
    masks = maps.masks
    maps = maps.maps
  if masks is None:
    raise ValueError('masks are None; only a MapStore brings its own')
  if len(maps) != len(masks):
    raise ValueError(f'there are {len(maps)} maps and {len(masks)} masks')
  areas, sizes, corners = [], [], []
  for index in range(len(maps)):
    shape = store_lib.check_map(maps[index], index).shape
    mask = store_lib.check_mask(masks[index], shape, index)
    region, area, corner = label_regions(mask)
    regions.append(region)
    areas.append(area)
    corners.append(corner)
    sizes.append(int(np.prod(shape)))
  return Pixels(maps, regions, corners, areas, sizes)


def label_regions(
  mask: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
  """Labels the 8-connected regions of a mask.

  Args:
    mask: (H, W) uint8 in {0, 1}.

  Returns:
    The region indices in the smallest box that holds all regions, the number
    of pixels of each region, (R,) int64, and the box's upper left corner.
    The indices are empty without regions, else (h, w) in the smallest unsigned
    dtype: 0 outside and 1 + the region's index inside.
  """
  rows = np.flatnonzero(mask.any(axis=1))
  if not len(rows):
    return np.empty(0, np.uint8), np.empty(0, np.int64), (0, 0)
  columns = np.flatnonzero(mask.any(axis=0))
  box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
  inside, count = ndimage.label(mask[box], _EIGHT)
  areas = np.bincount(inside.ravel(), minlength=count + 1)[1:]
  regions = inside.astype(np.min_scalar_type(count))
  return regions, areas, (int(rows[0]), int(columns[0]))


class ProSums:
  """Adds up AU-PRO (or sPRO) for several limits over blocks of steps.

  The area under PRO over FPR is added up pixel by pixel: a defect pixel adds
  its weight from the false-positive rate of its own score up to the limit.
  Where it ties with anomaly-free pixels the curve rises on a straight line
  through the tie. This is the trapezoid over the merged thresholds, with
  interpolation at the limit, without building the curve.
  """

  def __init__(self, limits: Sequence[float], negatives: int):
    """Starts at zero.

    Args:
      limits: FPR limits in (0, 1].
      negatives: number of anomaly-free pixels.

    Raises:
      ValueError: on a limit outside (0, 1].
    """
    for limit in limits:
      if not 0 < limit <= 1:
        raise ValueError(f'FPR limit {limit} is not in (0, 1]')
    # In false positives, not rates: exact integers against an exact limit.
    self._limits = [limit * negatives for limit in limits]
    self._areas = [0.0] * len(limits)

  def add(self, block: ranking.Steps) -> None:
    """Takes a block of `ranking.Steps` whose weights are shares of PRO."""
    above, upto = block.above, block.upto
    for k, limit in enumerate(self._limits):
      # Room up to the limit before and after the step.
      before = np.maximum(limit - above, 0.0)
      after = np.maximum(limit - upto, 0.0)
      width = np.maximum(upto - above, 1)
      inside = np.where(
        upto <= limit, (before + after) / 2, before * before / (2 * width)
      )
      self._areas[k] += float(np.dot(block.weight, inside))

  def done(self, block: ranking.Steps) -> bool:
    """Whether the blocks after this one lie beyond every limit."""
    return bool(block.upto[-1] >= max(self._limits, default=0))

  def result(self) -> list[float]:
    """The areas divided by their limits; NaN without negatives."""
    return [
      area / limit if limit else np.nan
      for area, limit in zip(self._areas, self._limits, strict=True)
    ]


def au_pro(
  maps: Maps,
  masks: store_lib.Arrays | None = None,
  limits: Sequence[float] = (0.3, 0.05),
) -> list[float]:
  """Area under the per-region overlap curve as MVTec AD defines it.

  PRO at a threshold is the mean, over the 8-connected regions of all masks, of
  the share of the region's pixels at or above it; FPR is the share of
  anomaly-free pixels at or above it, of all images, good ones included. The
  area is a trapezoid over every distinct score up to the limit, with PRO
  interpolated there, divided by the limit. Source: Bergmann et al., The MVTec
  Anomaly Detection Dataset, IJCV 2021, and the evaluation code with it.

  Args:
    maps: maps, or the `Pixels` of `prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    limits: FPR limits in (0, 1].

  Returns:
    A list of fractions, one for each limit; NaN without regions or without
    anomaly-free pixels.

  Raises:
    ValueError: as `prepare`; on a limit outside (0, 1].
  """
  pixels = prepare(maps, masks)
  sums = ProSums(limits, pixels.negatives)
  if not pixels.positives or not pixels.negatives:
    return [np.nan] * len(limits)
  # A little more than the limit, for the cut is at a quantile of a sample.
  head = 1.1 * max(limits, default=1.0)
  for block in pixels.steps(pixels.region_weights(), head):
    sums.add(block)
    if sums.done(block):
      break
  return sums.result()


def pro_curve(
  maps: Maps,
  masks: store_lib.Arrays | None = None,
  points: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The PRO curve, for plotting.

  Args:
    maps: maps, or the `Pixels` of `prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    points: approximate number of corners to keep, evenly spaced along the
      curve; None keeps all (the curve whose area `au_pro` returns).

  Returns:
    (K,) FPR and (K,) PRO, ascending, from (0, 0) to (1, 1).

  Raises:
    ValueError: without defect or without anomaly-free pixels; as `prepare`.
  """
  pixels = prepare(maps, masks)
  if not pixels.positives or not pixels.negatives:
    raise ValueError('a PRO curve needs both defect and anomaly-free pixels')
  blocks = list(pixels.steps(pixels.region_weights()))
  pro = np.cumsum(np.concatenate([block.weight for block in blocks]))
  before = np.append(0.0, pro[:-1])
  above = np.concatenate([block.above for block in blocks])
  upto = np.concatenate([block.upto for block in blocks])
  fpr = np.stack([above, upto], 1).ravel() / pixels.negatives
  pro = np.stack([before, pro], 1).ravel()
  fpr = np.concatenate([[0.0], fpr, [1.0]])
  pro = np.clip(np.concatenate([[0.0], pro, [1.0]]), 0, 1)
  if points is not None and len(fpr) > points:
    way = np.append(0.0, np.cumsum(np.diff(fpr) + np.diff(pro)))
    marks = np.linspace(0, way[-1], points)
    keep = np.unique(np.minimum(np.searchsorted(way, marks), len(way) - 1))
    keep = np.union1d(keep, [0, len(way) - 1])
    fpr, pro = fpr[keep], pro[keep]
  return fpr, pro


def curves(
  maps: Maps,
  masks: store_lib.Arrays | None = None,
  points: int = 400,
  focus: float = 0.3,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """The ROC and the PRO curve of the pixels in one pass, for plotting.

  The curves are thinned block by block, so that memory does not grow with the
  number of pixels.

  Args:
    maps: maps, or the `Pixels` of `prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    points: approximate number of corners to keep of each curve, evenly spaced
      along it, twice as dense up to `focus`.
    focus: an FPR.

  Returns:
    Two pairs, (K,) FPR and (K,) true-positive rate, (L,) FPR and (L,) PRO, both
    ascending from (0, 0) to (1, 1).

  Raises:
    ValueError: without defect or without anomaly-free pixels; as `prepare`.
  """
  pixels = prepare(maps, masks)
  if not pixels.positives or not pixels.negatives:
    raise ValueError('the curves need both defect and anomaly-free pixels')
  roc, pro = [np.zeros((2, 1))], [np.zeros((2, 1))]
  for block in pixels.steps(pixels.region_weights()):
    fpr = np.stack([block.above, block.upto], 1).ravel() / pixels.negatives
    for parts, gain in zip(
      (roc, pro), (block.hits / pixels.positives, block.weight), strict=True
    ):
      rate = parts[-1][1, -1] + np.append(0.0, np.cumsum(gain))
      rate = np.stack([rate[:-1], rate[1:]], 1).ravel()
      way = np.minimum(fpr, focus) / focus + fpr + rate
      cell = np.floor(way * (points / 3))
      keep = np.append(cell[1:] != cell[:-1], True)
      parts.append(np.stack([fpr[keep], np.minimum(rate[keep], 1.0)]))
  fpr, tpr = np.concatenate([*roc, np.ones((2, 1))], axis=1)
  pro_fpr, overlap = np.concatenate([*pro, np.ones((2, 1))], axis=1)
  return (fpr, tpr), (pro_fpr, overlap)


def pro_per_image(
  maps: Maps,
  masks: store_lib.Arrays | None = None,
  thresholds: int = 200,
  limit: float = 0.3,
) -> np.ndarray:
  """The PRO of RD4AD's line of work, one value per image with a defect.

  Published tables of RD4AD, RD++, DeSTSeg's successors and others use it. It
  is not `au_pro` and does not compare with it:

  - each defective image is scored on its own false-positive rate and its own
    thresholds, and the values are averaged; good images never count, so false
    alarms on them cost nothing;
  - the thresholds are 200 equal steps between the image's lowest and highest
    score, so the value changes under a monotone transform of the scores and
    few of them fall where the rates move;
  - the area is cut at the last threshold with FPR below the limit and divided
    by that threshold's FPR, not by the limit; PRO is not interpolated there,
    and the curve starts at the first threshold, not at (0, 0).

  Source: `compute_pro` of https://github.com/hq-deng/RD4AD (test.py).

  Args:
    maps: maps, or the `Pixels` of `prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    thresholds: number of steps between the lowest and the highest score.
    limit: FPR limit.

  Returns:
    (N,) float64: NaN for images without defects, and where the definition
    divides by zero: a constant map, or no false positive below the limit.
  """
  pixels = prepare(maps, masks)
  values = np.full(len(pixels.sizes), np.nan)
  for index in np.flatnonzero(pixels.defective).tolist():
    scores, regions = pixels.read_regions(index)
    low, high = float(scores.min()), float(scores.max())
    step = (high - low) / thresholds
    normal = np.sort(scores[regions == 0])
    if not step > 0 or not len(normal):
      continue
    marks = np.arange(low, high, step)
    fpr = 1 - np.searchsorted(normal, marks, 'right') / len(normal)
    hit = np.flatnonzero(regions)
    hit = hit[np.argsort(scores[hit])]
    areas = pixels.areas[index]
    weights = (1.0 / (len(areas) * areas))[regions[hit] - 1]
    missed = np.append(0.0, np.cumsum(weights))
    pro = 1 - missed[np.searchsorted(scores[hit], marks, 'right')]
    keep = fpr < limit
    if np.count_nonzero(keep) > 1 and fpr[keep].max() > 0:
      fpr, pro = fpr[keep][::-1], pro[keep][::-1]
      values[index] = np.trapezoid(pro, fpr / fpr[-1])
  return values
