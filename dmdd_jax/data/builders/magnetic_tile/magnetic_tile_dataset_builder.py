"""Magnetic tile defects: https://github.com/abin24/Magnetic-tile-defect-datasets."""

import tensorflow_datasets as tfds

from dmdd_jax.data import layouts
from dmdd_jax.data.builders import base


class Builder(base.LayoutBuilder):
  """Magnetic tile defects, a config per category."""

  LAYOUT = 'magnetic_tile'
  ARCHIVES = ()
  LICENCE = 'not stated: the repository has no licence file'
  HOMEPAGE = 'https://github.com/abin24/Magnetic-tile-defect-datasets.'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the set from https://github.com/abin24/Magnetic-tile-defect-datasets.'
    ' and put its unpacked folder'
    ' into manual_dir, or name the unpacked folder as manual_dir.'
  )
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name)
    for name in layouts.CATEGORIES['magnetic_tile']
  ]
