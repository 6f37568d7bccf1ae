"""MVTec AD: https://www.mvtec.com/company/research/datasets/mvtec-ad"""

import tensorflow_datasets as tfds

from dmdd_jax.data.builders import base

_CATEGORIES = (
  'bottle',
  'cable',
  'capsule',
  'carpet',
  'grid',
  'hazelnut',
  'leather',
  'metal_nut',
  'pill',
  'screw',
  'tile',
  'toothbrush',
  'transistor',
  'wood',
  'zipper',
)


class Builder(base.LayoutBuilder):
  """MVTec AD, a config per category."""

  LAYOUT = 'mvtec_ad'
  ARCHIVES = ('mvtec_anomaly_detection.tar.xz',)
  LICENCE = 'CC BY-NC-SA 4.0'
  HOMEPAGE = 'https://www.mvtec.com/company/research/datasets/mvtec-ad'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the set from https://www.mvtec.com/company/research/datasets/mvtec-ad'
    ' and put mvtec_anomaly_detection.tar.xz or its unpacked folder'
    ' into manual_dir, or name the unpacked folder as manual_dir.'
  )
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in _CATEGORIES]
