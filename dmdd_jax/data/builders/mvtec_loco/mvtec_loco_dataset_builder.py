"""MVTec LOCO AD: https://www.mvtec.com/company/research/datasets/mvtec-loco"""

import json
from typing import Any

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from dmdd_jax.data import files
from dmdd_jax.data import layouts
from dmdd_jax.data import records as records_lib
from dmdd_jax.data.builders import base


class Builder(base.LayoutBuilder):
  """MVTec LOCO AD, a config per category."""

  LAYOUT = 'mvtec_loco'
  ARCHIVES = ('mvtec_loco_anomaly_detection.tar.xz',)
  LICENCE = 'CC BY-NC-SA 4.0'
  HOMEPAGE = 'https://www.mvtec.com/company/research/datasets/mvtec-loco'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the set from https://www.mvtec.com/company/research/datasets/mvtec-loco'
    ' and put mvtec_loco_anomaly_detection.tar.xz or its unpacked folder'
    ' into manual_dir, or name the unpacked folder as manual_dir.'
  )
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name)
    for name in layouts.CATEGORIES['mvtec_loco']
  ]

  def extra_features(self) -> dict[str, Any]:
    """Of each mask of an image: its area from which it counts as found."""
    return {'saturation': tfds.features.Sequence(np.float32)}

  def extra_values(
    self, root: str, record: records_lib.Record
  ) -> dict[str, Any]:
    """Areas in pixels, in the order of the masks' names; none if good."""
    if record.mask is None:
      return {'saturation': []}
    path = epath.Path(root) / self.builder_config.name / 'defects_config.json'
    if not path.exists():
      raise records_lib.MissingDataError(f'found no file {path}')
    kinds = {k['pixel_value']: k for k in json.loads(path.read_text())}
    return {'saturation': [_area(m, kinds) for m in _masks(record.mask)]}


def _masks(path: str) -> tuple[str, ...]:
  return files.images(path) if epath.Path(path).is_dir() else (path,)


def _area(path: str, kinds: dict[int, dict[str, Any]]) -> float:
  """The saturation area of one mask, by the value of its pixels."""
  with Image.open(path) as image:
    values = np.asarray(image)
  kind = kinds.get(int(values.max()))
  if kind is None:
    raise records_lib.DatasetError(
      f'{path}: defects_config.json has no pixel value {values.max()}'
    )
  area, threshold = np.count_nonzero(values), kind['saturation_threshold']
  if kind['relative_saturation']:
    return float(threshold * area)
  return float(min(threshold, area))
