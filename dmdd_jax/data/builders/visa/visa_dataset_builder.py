"""VisA: https://github.com/amazon-science/spot-diff"""

import tensorflow_datasets as tfds

from dmdd_jax.data import layouts
from dmdd_jax.data.builders import base


class Builder(base.LayoutBuilder):
  """VisA, a config per category."""

  LAYOUT = 'visa'
  ARCHIVES = ('VisA_20220922.tar',)
  LICENCE = 'CC BY 4.0'
  HOMEPAGE = 'https://github.com/amazon-science/spot-diff'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the set from https://github.com/amazon-science/spot-diff'
    ' and put VisA_20220922.tar or its unpacked folder'
    ' into manual_dir, or name the unpacked folder as manual_dir.'
  )
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name) for name in layouts.CATEGORIES['visa']
  ]
