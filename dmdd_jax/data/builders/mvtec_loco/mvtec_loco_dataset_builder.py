"""MVTec LOCO AD: https://www.mvtec.com/company/research/datasets/mvtec-loco"""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dmdd_jax.data import loco
from dmdd_jax.data import records as records_lib
from dmdd_jax.data.builders import base


class Builder(base.LayoutBuilder):
  """MVTec LOCO AD, a config per category."""

  LAYOUT = 'mvtec_loco'
  ARCHIVES = ('mvtec_loco_anomaly_detection.tar.xz',)
  LICENCE = 'CC BY-NC-SA 4.0'
  HOMEPAGE = 'https://www.mvtec.com/company/research/datasets/mvtec-loco'

  def extra_features(self) -> dict[str, Any]:
    """For each mask of an image: the area at which it counts as detected."""
    return {'saturation': tfds.features.Sequence(np.float32)}

  def extra_values(
    self, root: str, record: records_lib.Record
  ) -> dict[str, Any]:
    """Areas in pixels, in the order of the masks' names; none if good."""
    if record.mask is None:
      return {'saturation': []}
    kinds = loco.read_config(root, self.builder_config.name)
    regions = loco.read_regions(record, kinds)
    return {'saturation': [float(area) for _, area in regions]}
