"""The suite `metrics`: all figures of a test set beside scikit-learn's."""

import numpy as np

from dmdd_jax.benchmark import measure


def run(options: measure.Options) -> list[measure.Figure]:
  """All pixel metrics and AU-PRO, against scikit-learn and 200 thresholds."""
  sizes = (options.size,) if options.size < 256 else (options.size, 900)
  return [figure for size in sizes for figure in _metrics_at(size, options)]


def _metrics_at(size: int, options: measure.Options) -> list[measure.Figure]:
  """The figures of 100 maps of one size."""
  from sklearn import metrics as sklearn_metrics

  from dmdd_jax.metrics import results

  maps, masks = fake_test_set(100, size)
  scores, labels = maps.max(axis=(1, 2)), masks.max(axis=(1, 2))

  def ours():
    return results.compute(maps, masks, scores, labels, extra=())

  times = options.repeats if size <= 256 else 2
  mine = measure.measure(ours, times)
  theirs = measure.measure(
    lambda: sklearn_metrics.roc_auc_score(masks.ravel(), maps.ravel()), 1, 0
  )
  loop = measure.measure(lambda: pro_200_thresholds(maps, masks), 1, 0)
  sort = measure.measure(lambda: np.sort(maps, axis=None), times)
  name = f'100 maps of {size} x {size}'
  return [
    measure.duration(
      f'{name}, all pixel metrics',
      mine,
      baseline=theirs.median,
      baseline_is="scikit-learn's pixel AUROC alone",
      limit=sort.median,
      limit_is="NumPy's sort of all scores",
    ),
    measure.duration(
      f'{name}, the same, both AU-PRO',
      mine,
      baseline=loop.median,
      baseline_is='AU-PRO by 200 thresholds',
    ),
    measure.Figure(
      f'{name}, peak memory',
      'MB',
      (maps.nbytes + measure.peak_memory(ours)) / 1e6,
      limit=maps.nbytes / 1e6,
      limit_is='the maps',
    ),
  ]


def fake_test_set(
  count: int, size: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Maps (N, S, S) float32 with smooth noise and masks uint8 with blobs.

  Three in four images hold one to three discs, on which the map is raised.
  """
  from scipy import ndimage

  rng = np.random.default_rng(seed)
  maps = np.empty((count, size, size), np.float32)
  masks = np.zeros((count, size, size), np.uint8)
  y, x = np.mgrid[:size, :size]
  for index in range(count):
    noise = rng.standard_normal((size // 4, size // 4)).astype(np.float32)
    maps[index] = ndimage.zoom(noise, 4, order=1)[:size, :size]
    for _ in range(rng.integers(1, 4) if index % 4 else 0):
      center, radius = rng.uniform(0, size, 2), rng.uniform(0.02, 0.1) * size
      disc = (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2
      masks[index][disc] = 1
    maps[index] += 1.5 * masks[index]
  return maps, masks


def pro_200_thresholds(maps: np.ndarray, masks: np.ndarray) -> float:
  """The usual AU-PRO loop, approximate: the baseline of the metrics suite."""
  from scipy import ndimage

  regions = [ndimage.label(mask, np.ones((3, 3)))[0] for mask in masks]
  normal = masks == 0
  rates, overlaps = [], []
  for threshold in np.linspace(maps.max(), maps.min(), 200):
    above = maps >= threshold
    rates.append(np.count_nonzero(above & normal) / np.count_nonzero(normal))
    overlaps.append(
      np.mean(
        np.concatenate(
          [
            ndimage.mean(hit, region, np.arange(1, region.max() + 1))
            for hit, region in zip(above, regions)
            if region.max()
          ]
        )
      )
    )
  within = [rate for rate in rates if rate < 0.3]
  overlaps = [*overlaps[: len(within)], np.interp(0.3, rates, overlaps)]
  return float(np.trapezoid(overlaps, [*within, 0.3]) / 0.3)
