"""Metrics of how well regions are outlined: AU-PRO, sPRO, AUPIMO.

  pro_30, pro_05 = region.au_pro(maps, masks, limits=(0.3, 0.05))
  fpr, pro = region.pro_curve(maps, masks, points=500)
  per_image = region.aupimo(maps, masks)

Maps are (N, H, W) or a sequence of N (H_i, W_i) arrays of floats, higher means
more anomalous; masks have the same shapes, in {0, 1}. Every distinct score is a
threshold, ties are merged, nothing is binned.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import store as store_lib

_EIGHT = np.ones((3, 3), int)
# Bytes of region indices kept in memory for maps that are themselves on disk.
_REGION_BYTES = 2**28
# Scores of normal images that AUPIMO holds before it drops the lower ones.
_TOP_PIXELS = 2**22


class Pixels(NamedTuple):
  """Maps checked and their regions found; what every function here needs.

  Attributes:
    maps: sequence of N finite (H_i, W_i) float arrays.
    regions: sequence of N arrays, empty for an image without defects, else
      (H_i, W_i) unsigned: 0 outside of defects, else 1 + the region's index.
    areas: N arrays (R_i,) of pixels per region.
    sizes: N pixel counts.
  """

  maps: object
  regions: object
  areas: list
  sizes: list

  @property
  def positives(self):
    """Defect pixels of all images."""
    return int(sum(area.sum() for area in self.areas))

  @property
  def negatives(self):
    """Anomaly-free pixels of all images, good ones included."""
    return sum(self.sizes) - self.positives

  @property
  def defective(self):
    """(N,) bool, which images have a defect pixel."""
    return np.array([len(area) > 0 for area in self.areas], bool)

  def read(self, index):
    """The (n,) scores of an image, and its region indices or None."""
    scores = store_lib.as_float(self.maps[index]).reshape(-1)
    if not len(self.areas[index]):
      return scores, None
    return scores, self.regions[index].reshape(-1)

  def steps(self, weights=None):
    """`ranking.steps` over the images.

    Args:
      weights: N arrays (R_i,), what a pixel of each region weighs, or None.
    """

    def read(index):
      scores, regions = self.read(index)
      weight = None if weights is None else np.append(0.0, weights[index])
      return scores, regions, weight

    block = None
    if isinstance(self.regions, store_lib.ArraySpool):
      block = min(2**24, max(2**20, sum(self.sizes) // 4))
    return ranking.steps(read, self.sizes, block)

  def region_weights(self):
    """Weights that make a cumulative sum over `steps` the mean overlap."""
    count = sum(len(area) for area in self.areas)
    return [1.0 / (count * area) for area in self.areas]


def prepare(maps, masks):
  """Checks maps and masks and finds their regions.

  Args:
    maps: (N, H, W) floats or N arrays (H_i, W_i), or a `maps.MapStore` with
      masks None. Finite; read again and again, never copied as a whole.
    masks: the same shapes, in {0, 1}; zeros for a good image.

  Returns:
    `Pixels`, which all functions of this module also take as `maps`, so that
    several metrics share the work.

  Raises:
    ValueError: on counts or shapes that disagree, other mask values, maps that
      are not finite; the message names the image's index.
  """
  if isinstance(maps, Pixels):
    return maps
  regions = []
  if isinstance(maps, store_lib.MapStore):
    regions = store_lib.ArraySpool(
      min(_REGION_BYTES, maps.limit_bytes), maps.directory
    )
    maps, masks = maps.maps, maps.masks
  if len(maps) != len(masks):
    raise ValueError(f'there are {len(maps)} maps and {len(masks)} masks')
  areas, sizes = [], []
  for index in range(len(maps)):
    shape = store_lib.check_map(maps[index], index).shape
    mask = store_lib.check_mask(masks[index], shape, index)
    found, area = label_regions(mask)
    regions.append(found)
    areas.append(area)
    sizes.append(int(np.prod(shape)))
  return Pixels(maps, regions, areas, sizes)


def label_regions(mask):
  """Finds the 8-connected regions of a mask.

  Args:
    mask: (H, W) uint8 in {0, 1}.

  Returns:
    The region indices, empty if there are none, else (H, W) in the smallest
    unsigned dtype, 0 outside and 1 + the region's index inside; and (R,) int64
    the pixels of each.
  """
  rows = np.flatnonzero(mask.any(axis=1))
  if not len(rows):
    return np.empty(0, np.uint8), np.empty(0, np.int64)
  columns = np.flatnonzero(mask.any(axis=0))
  box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
  inside, count = ndimage.label(mask[box], _EIGHT)
  regions = np.zeros(mask.shape, np.min_scalar_type(count))
  regions[box] = inside
  return regions, np.bincount(inside.ravel(), minlength=count + 1)[1:]


class ProSums:
  """Adds up AU-PRO (or sPRO) for several limits over blocks of steps.

  The area under PRO over FPR is taken pixel by pixel: a defect pixel adds its
  weight to PRO from the false-positive rate at which it is found up to the
  limit. Where it ties with anomaly-free pixels the curve rises on a straight
  line through the tie; this is the trapezoid over the merged thresholds, and
  the interpolation at the limit, without building the curve.
  """

  def __init__(self, limits, negatives):
    for limit in limits:
      if not 0 < limit <= 1:
        raise ValueError(f'FPR limit {limit} is not in (0, 1]')
    # In false positives, not rates: exact integers against an exact limit.
    self._limits = [limit * negatives for limit in limits]
    self._areas = [0.0] * len(limits)

  def add(self, block):
    """Takes a block of `ranking.Steps` whose weights are shares of PRO."""
    above, upto = block.above, block.upto
    for k, limit in enumerate(self._limits):
      left = np.maximum(limit - above, 0.0)
      right = np.maximum(limit - upto, 0.0)
      width = np.maximum(upto - above, 1)
      inside = np.where(
        upto <= limit, (left + right) / 2, left * left / (2 * width)
      )
      self._areas[k] += float(np.dot(block.weight, inside))

  def done(self, block):
    """Whether the blocks after this one lie beyond every limit."""
    return block.upto[-1] >= max(self._limits, default=0)

  def result(self):
    """The areas divided by their limits; NaN without negatives."""
    return [
      area / limit if limit else np.nan
      for area, limit in zip(self._areas, self._limits, strict=True)
    ]


def au_pro(maps, masks=None, limits=(0.3, 0.05)):
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
  for block in pixels.steps(pixels.region_weights()):
    sums.add(block)
    if sums.done(block):
      break
  return sums.result()


def pro_curve(maps, masks=None, points=None):
  """The PRO curve, for plotting.

  Args:
    maps: maps, or the `Pixels` of `prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    points: keep about this many corners, evenly spaced along the curve; None
      keeps all of them (the curve whose area `au_pro` returns).

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


def curves(maps, masks=None, points=400, focus=0.3):
  """The ROC and the PRO curve of the pixels in one pass, for plotting.

  They are thinned as they are found, so that memory stays bounded whatever the
  number of pixels.

  Args:
    maps: maps, or the `Pixels` of `prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    points: about how many corners to keep of each curve, evenly spaced along
      it, twice as dense up to `focus`.
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
  found = ([np.zeros((2, 1))], [np.zeros((2, 1))])
  for block in pixels.steps(pixels.region_weights()):
    fpr = np.stack([block.above, block.upto], 1).ravel() / pixels.negatives
    for parts, gain in zip(
      found, (block.hits / pixels.positives, block.weight), strict=True
    ):
      rate = parts[-1][1, -1] + np.append(0.0, np.cumsum(gain))
      rate = np.stack([rate[:-1], rate[1:]], 1).ravel()
      way = np.minimum(fpr, focus) / focus + fpr + rate
      cell = np.floor(way * (points / 3))
      keep = np.append(cell[1:] != cell[:-1], True)
      parts.append(np.stack([fpr[keep], np.minimum(rate[keep], 1.0)]))
  for parts in found:
    parts.append(np.ones((2, 1)))
  return tuple(tuple(np.concatenate(parts, axis=1)) for parts in found)


def pro_per_image(maps, masks=None, thresholds=200, limit=0.3):
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
    thresholds: how many steps.
    limit: FPR limit.

  Returns:
    (N,) float64: NaN for images without defects, and where the definition
    divides by zero: a constant map, or no false positive below the limit.
  """
  pixels = prepare(maps, masks)
  values = np.full(len(pixels.sizes), np.nan)
  for index in np.flatnonzero(pixels.defective):
    scores, regions = pixels.read(index)
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


def spro(maps, regions, limits=(0.3, 0.05)):
  """Area under the saturated per-region overlap, for MVTec LOCO AD.

  sPRO at a threshold is the mean over regions of min(pixels found / saturation
  area, 1): a region counts as found once its saturation area is, for where a
  part is missing no outline is right. FPR, trapezoid and limit are those of
  `au_pro`; with every saturation area the region's own it is `au_pro`. Source:
  Bergmann et al., Beyond Dents and Scratches, IJCV 2022.

  Args:
    maps: (N, H, W) floats or N arrays (H_i, W_i).
    regions: N sequences, empty for a good image, of pairs (mask, area): mask
      (H_i, W_i) in {0, 1} of one region, connected or not, which may overlap
      others; area its saturation area in pixels, see data/loco.py.
    limits: FPR limits in (0, 1].

  Returns:
    A list of fractions, one for each limit; NaN without regions or without
    anomaly-free pixels.

  Raises:
    ValueError: as `prepare`; on an empty region or an area that is not
      positive.
  """
  if len(maps) != len(regions):
    raise ValueError(f'there are {len(maps)} maps and {len(regions)} regions')
  scores, weights, unions = [], [], []
  for index, pairs in enumerate(regions):
    anomaly_map = store_lib.check_map(maps[index], index)
    union = np.zeros(anomaly_map.shape, np.uint8)
    for mask, area in pairs:
      mask = store_lib.check_mask(mask, anomaly_map.shape, index)
      union |= mask
      inside = np.sort(anomaly_map[mask > 0])[::-1]
      if not len(inside) or not area > 0:
        raise ValueError(
          f'image {index}: a region of {len(inside)} pixels has saturation '
          f'area {area}; both must be positive'
        )
      area = min(area, len(inside))
      scores.append(inside)
      weights.append(np.clip(area - np.arange(len(inside)), 0, 1) / area)
    unions.append(union)
  pixels = prepare(maps, unions)
  if not pixels.positives or not pixels.negatives:
    return [np.nan] * len(limits)
  scores, count = np.concatenate(scores), len(scores)
  order = np.argsort(scores)
  scores = scores[order]
  total = np.append(0.0, np.cumsum(np.concatenate(weights)[order] / count))
  sums = ProSums(limits, pixels.negatives)
  for block in pixels.steps():
    weight = total[np.searchsorted(scores, block.score, 'right')]
    weight -= total[np.searchsorted(scores, block.score)]
    sums.add(block._replace(weight=weight))
  return sums.result()


def aupimo(maps, masks=None, normal=None, bounds=(1e-5, 1e-4)):
  """Area under the per-image overlap curve, one value per defective image.

  At a threshold, the shared FPR is the mean over the normal images of the
  share of the image's pixels at or above it, and an image's overlap is the
  share of its defect pixels at or above it. The value is the mean overlap over
  the decimal logarithm of the shared FPR between the bounds. Source: Bertoldo
  et al., AUPIMO, BMVC 2024, arXiv 2401.01984.

  Every distinct score is a threshold. At a rate between two that occur the
  overlap is the highest at or below that rate; where scores of normal and
  defect pixels tie it is interpolated over the logarithm. (The reference
  implementation samples 300,000 equal steps between the lowest and highest
  score and cuts at the samples nearest to the bounds.)

  Args:
    maps: maps, or the `Pixels` of `prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    normal: (N,) bool, the normal images; by default those without defects.
    bounds: the lowest and highest shared FPR, 0 < low < high < 1.

  Returns:
    (N,) float64, NaN for images without defects. All NaN if there is no normal
    image, or if these have too few pixels for one of them to be a rate below
    the upper bound (see `aupimo_undefined`).
  """
  pixels = prepare(maps, masks)
  normal = ~pixels.defective if normal is None else np.asarray(normal, bool)
  values = np.full(len(pixels.sizes), np.nan)
  if aupimo_undefined(pixels, normal, bounds):
    return values
  marks, above, upto = shared_fpr(pixels, normal, bounds[1])
  for index in np.flatnonzero(pixels.defective):
    scores, regions = pixels.read(index)
    defect = np.sort(scores[regions > 0])
    before = 1 - np.searchsorted(defect, marks, 'right') / len(defect)
    after = 1 - np.searchsorted(defect, marks) / len(defect)
    values[index] = log_area(above, upto, before, after, bounds)
  return values


def aupimo_undefined(pixels, normal, bounds=(1e-5, 1e-4)):
  """Why AUPIMO is undefined on these images, or None if it is defined."""
  if not pixels.positives:
    return 'no defect pixels in the masks'
  sizes = np.array(pixels.sizes)[normal]
  if not len(sizes):
    return 'no normal images, whose false-positive rate it needs'
  rate = 1 / (len(sizes) * sizes.max())
  if rate > bounds[1]:
    return (
      f'one pixel of the normal images is a false-positive rate of {rate:.1e}, '
      f'above the upper bound {bounds[1]:g}'
    )
  return None


def shared_fpr(pixels, normal, highest):
  """The shared FPR of normal images at their distinct scores, to a bound.

  Args:
    pixels: `Pixels`.
    normal: (N,) bool, at least one true.
    highest: the FPR to go to, below 1.

  Returns:
    (K,) scores, descending; (K,) the FPR above each and (K,) at or above each.
    Only the last of these exceeds `highest`.
  """
  images = np.flatnonzero(normal)
  top, weight = [], []
  for index in images:
    scores, size = pixels.read(index)[0], pixels.sizes[index]
    # A pixel below its own image's first so many lies beyond the bound.
    count = min(size, int(highest * len(images) * size) + 1)
    top.append(np.partition(scores, size - count)[size - count :])
    weight.append(np.full(count, 1.0 / (len(images) * size)))
    if sum(map(len, top)) > _TOP_PIXELS:
      head, rates = _highest(top, weight, highest)
      top, weight = [head], [rates]
  top, weight = _highest(top, weight, highest)
  rate = np.cumsum(weight)
  ends = np.flatnonzero(np.append(top[1:] != top[:-1], True))
  marks, upto = top[ends], rate[ends]
  last = min(int(np.searchsorted(upto, highest, 'right')), len(ends) - 1)
  marks, upto = marks[: last + 1], upto[: last + 1]
  # Ties with the last mark may have been cut off above.
  upto[-1] = sum(
    np.count_nonzero(pixels.read(index)[0] >= marks[-1]) / pixels.sizes[index]
    for index in images
  ) / len(images)
  return marks, np.append(0.0, upto[:-1]), upto


def _highest(scores, weights, total):
  """Joins lists of scores and weights; keeps the first of more than `total`.

  Returns the highest scores, descending, and their weights, up to the one with
  which the sum of the weights exceeds `total`; ties with it may be missing.
  """
  scores, weights = np.concatenate(scores), np.concatenate(weights)
  order = np.argsort(-scores)
  weights = weights[order]
  keep = np.searchsorted(np.cumsum(weights), total, 'right') + 1
  return scores[order[:keep]], weights[:keep]


def log_area(above, upto, before, after, bounds):
  """Mean of a curve over log x within bounds.

  Args:
    above: (..., K) x where each segment starts; from 0 on the curve is flat.
    upto: (..., K) x where it ends.
    before: (..., K) y where it starts.
    after: (..., K) y where it ends.
    bounds: lowest and highest x, > 0.

  Returns:
    (...,) the area over log x divided by log(highest / lowest).
  """
  low, high = np.log(bounds)
  with np.errstate(divide='ignore'):
    start, end = np.log(above), np.log(upto)
  left, right = np.clip(start, low, high), np.clip(end, low, high)
  tie = (above > 0) & (upto > above)
  slope = np.zeros(np.broadcast_shapes(start.shape, before.shape))
  np.divide(
    after - before,
    np.subtract(end, start, where=tie, out=np.ones_like(start)),
    where=tie,
    out=slope,
  )
  middle = np.where(tie, (left + right) / 2 - start, 0.0)
  area = np.sum((right - left) * (before + slope * middle), axis=-1)
  return area / (high - low)
