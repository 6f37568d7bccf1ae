"""AUPIMO: each defective image's overlap at very few false alarms.

Synopsis:

  per_image = aupimo.aupimo(maps, masks)
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dmdd_jax.metrics import region
from dmdd_jax.metrics import store as store_lib

# Scores of normal images that AUPIMO holds before it drops the lower ones.
_TOP_PIXELS = 2**20


def aupimo(
  maps: region.Maps,
  masks: store_lib.Arrays | None = None,
  normal: npt.ArrayLike | None = None,
  bounds: tuple[float, float] = (1e-5, 1e-4),
) -> np.ndarray:
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
    maps: maps, or the `Pixels` of `region.prepare`.
    masks: masks; None with `Pixels` or a `MapStore`.
    normal: (N,) bool, the normal images; by default those without defects.
    bounds: the lowest and highest shared FPR, 0 < low < high < 1.

  Returns:
    (N,) float64, NaN for images without defects. All NaN without normal images,
    and if one pixel of the normal images is a rate above the upper bound (see
    `aupimo_undefined`).
  """
  pixels = region.prepare(maps, masks)
  chosen = ~pixels.defective if normal is None else np.asarray(normal, bool)
  values = np.full(len(pixels.sizes), np.nan)
  if aupimo_undefined(pixels, chosen, bounds):
    return values
  marks, above, upto = shared_fpr(pixels, chosen, bounds[1])
  for index in np.flatnonzero(pixels.defective).tolist():
    scores, regions = pixels.read_regions(index)
    defect = np.sort(scores[regions > 0])
    before = 1 - np.searchsorted(defect, marks, 'right') / len(defect)
    after = 1 - np.searchsorted(defect, marks) / len(defect)
    values[index] = log_area(above, upto, before, after, bounds)
  return values


def aupimo_undefined(
  pixels: region.Pixels,
  normal: np.ndarray,
  bounds: tuple[float, float] = (1e-5, 1e-4),
) -> str | None:
  """The reason why AUPIMO is undefined on these images, or None.

  Args:
    pixels: `Pixels` of N images.
    normal: (N,) bool, the normal images.
    bounds: the lowest and highest shared FPR.
  """
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


def shared_fpr(
  pixels: region.Pixels, normal: np.ndarray, highest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The shared FPR of normal images at their distinct scores, to a bound.

  Args:
    pixels: `Pixels`.
    normal: (N,) bool, at least one true.
    highest: the FPR to go to, below 1.

  Returns:
    (K,) scores, descending; (K,) the FPR above each and (K,) at or above each.
    Only the last of these exceeds `highest`.
  """
  images = np.flatnonzero(normal).tolist()
  top: list[np.ndarray] = []
  weight: list[np.ndarray] = []
  floor = None
  for index in images:
    scores, size = pixels.read(index), pixels.sizes[index]
    # A pixel below the highest `count` of its image lies beyond the bound.
    count = min(size, int(highest * len(images) * size) + 1)
    if floor is not None:
      scores = scores[scores >= floor]
    if len(scores) > count:
      scores = np.partition(scores, len(scores) - count)[-count:]
    top.append(scores)
    weight.append(np.full(len(scores), 1.0 / (len(images) * size)))
    if sum(map(len, top)) > _TOP_PIXELS:
      head, rates = _highest(top, weight, highest)
      top, weight = [head], [rates]
      if rates.sum() > highest:
        floor = head[-1]
  scores, rates = _highest(top, weight, highest)
  ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
  marks, upto = scores[ends], np.cumsum(rates)[ends]
  last = min(int(np.searchsorted(upto, highest, 'right')), len(ends) - 1)
  marks, upto = marks[: last + 1], upto[: last + 1]
  # Ties with the last mark may have been cut off above.
  shares = [
    np.count_nonzero(pixels.read(index) >= marks[-1]) / pixels.sizes[index]
    for index in images
  ]
  upto[-1] = sum(shares) / len(images)
  return marks, np.append(0.0, upto[:-1]), upto


def _highest(
  scores: Sequence[np.ndarray], weights: Sequence[np.ndarray], total: float
) -> tuple[np.ndarray, np.ndarray]:
  """Joins lists of scores and weights; keeps the highest up to `total`.

  Returns the highest scores, descending, and their weights, up to the score
  with which the sum of the weights exceeds `total`. Ties with it may be cut.
  """
  joined, weight = np.concatenate(scores), np.concatenate(weights)
  order = np.argsort(-joined)
  weight = weight[order]
  keep = np.searchsorted(np.cumsum(weight), total, 'right') + 1
  return joined[order[:keep]], weight[:keep]


def log_area(
  above: np.ndarray,
  upto: np.ndarray,
  before: np.ndarray,
  after: np.ndarray,
  bounds: tuple[float, float],
) -> np.ndarray:
  """Mean of a curve over log x within bounds.

  Args:
    above: (..., K) x where each segment starts; a segment from 0 is flat.
    upto: (..., K) x where each segment ends.
    before: (..., K) y where each segment starts.
    after: (..., K) y where each segment ends.
    bounds: lowest and highest x, > 0.

  Returns:
    (...,) the area over log x divided by log(highest / lowest).
  """
  low, high = np.log(bounds)
  with np.errstate(divide='ignore'):
    start, end = np.log(above), np.log(upto)
  first, last = np.clip(start, low, high), np.clip(end, low, high)
  tie = (above > 0) & (upto > above)
  slope = np.zeros(np.broadcast_shapes(start.shape, before.shape))
  np.divide(
    after - before,
    np.subtract(end, start, where=tie, out=np.ones_like(start)),
    where=tie,
    out=slope,
  )
  middle = np.where(tie, (first + last) / 2 - start, 0.0)
  area = np.sum((last - first) * (before + slope * middle), axis=-1)
  return area / (high - low)
