"""MVTec LOCO AD's saturated per-region overlap.

Synopsis:

  spro_30, spro_05 = spro.spro(maps, regions, limits=(0.3, 0.05))
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dmdd_jax.metrics import region
from dmdd_jax.metrics import store as store_lib


def spro(
  maps: store_lib.Arrays,
  regions: Sequence[Sequence[tuple[npt.ArrayLike, float]]],
  limits: Sequence[float] = (0.3, 0.05),
) -> list[float]:
  """Area under the saturated per-region overlap, for MVTec LOCO AD.

  sPRO at a threshold is the mean over regions of min(n / saturation area, 1),
  where n is the number of the region's pixels at or above the threshold. A
  region counts in full once n reaches its saturation area, because a missing
  part has no exact outline. FPR, trapezoid and limit are those of
  `region.au_pro`. If every saturation area is the region's own area, the result
  is that of `region.au_pro`. Source: Bergmann et al., Beyond Dents and
  Scratches, IJCV 2022.

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
    ValueError: as `region.prepare`; on an empty region or an area that is not
      positive.
  """
  if len(maps) != len(regions):
    raise ValueError(f'there are {len(maps)} maps and {len(regions)} regions')
  scores, weights, unions = [], [], []
  for index, pairs in enumerate(regions):
    anomaly_map = store_lib.check_map(maps[index], index)
    union = np.zeros(anomaly_map.shape, np.uint8)
    for mask, area in pairs:
      binary = store_lib.check_mask(mask, anomaly_map.shape, index)
      union |= binary
      inside = np.sort(anomaly_map[binary > 0])[::-1]
      if not len(inside) or not area > 0:
        raise ValueError(
          f'image {index}: a region of {len(inside)} pixels has saturation '
          f'area {area}; both must be positive'
        )
      area = min(area, len(inside))
      scores.append(inside)
      weights.append(np.clip(area - np.arange(len(inside)), 0, 1) / area)
    unions.append(union)
  pixels = region.prepare(maps, unions)
  if not pixels.positives or not pixels.negatives:
    return [np.nan] * len(limits)
  joined = np.concatenate(scores)
  order = np.argsort(joined)
  joined = joined[order]
  shares = np.concatenate(weights)[order] / len(scores)
  total = np.append(0.0, np.cumsum(shares))
  sums = region.ProSums(limits, pixels.negatives)
  for block in pixels.steps():
    weight = total[np.searchsorted(joined, block.score, 'right')]
    weight -= total[np.searchsorted(joined, block.score)]
    sums.add(block._replace(weight=weight))
  return sums.result()
