"""Metrics of anomaly maps that any software wrote to files.

Synopsis:

  rows = evaluate_maps.evaluate_maps('submission', 'data/mvtec')
  print(results.format_table(rows))
"""

from collections.abc import Sequence
import os
from typing import Any

from absl import logging
import numpy as np

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import maps as map_files
from dmdd_jax.metrics import results as results_lib


def evaluate_maps(
  maps_root: str,
  data_root: str,
  categories: Sequence[str] = (),
  *,
  score_top_pixels: int = 100,
) -> dict[str, dict[str, Any]]:
  """Evaluates maps against ground truth, each category by itself.

  Args:
    maps_root: CATEGORY/test/DEFECT/ID.tiff or .npy below it, one for every
      test image. A map of another size than its mask is resized to it.
    data_root: the data set in MVTec's layout.
    categories: which; by default those that have a folder of maps.
    score_top_pixels: the image score is the mean of the map's highest pixels,
      this many; 1 is the maximum. How our runs score: `head.score_weight`.

  Returns:
    {category: what `metrics.results.compute` returns}

  Raises:
    MissingDataError, DatasetError, BadImageError: the data set is at fault.
    BadMapError: a map is missing or cannot be used.
  """
  if not os.path.isdir(maps_root):
    raise files.MissingDataError(f'there is no folder {maps_root!r}')
  if not categories:
    known = layouts.list_categories(data_root)
    categories = [c for c in known if os.path.isdir(f'{maps_root}/{c}/test')]
  if not categories:
    raise map_files.BadMapError(
      f'{maps_root} holds no CATEGORY/test for any category of {data_root}'
    )
  rows = {}
  for category in categories:
    records = layouts.list_mvtec(data_root, category).test
    scores = []
    with results_lib.MapStore() as store:
      stems = map_files.map_paths(maps_root, category, records)
      for record, stem in zip(records, stems):
        anomaly_map = map_files.read_map(map_files.find_map(stem))
        scores.append(map_files.top_mean(anomaly_map, score_top_pixels))
        mask = images_lib.native_mask(record)
        store.append(map_files.resize_map(anomaly_map, mask.shape), mask)
      rows[category] = results_lib.compute(
        store,
        None,
        np.array(scores),
        np.array([record.label for record in records]),
      )
    logging.info('%s: %d maps', category, len(records))
  return rows
