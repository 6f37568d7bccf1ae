"""MPDD (Metal Parts Defect Detection): https://github.com/stepanje/MPDD"""

import tensorflow_datasets as tfds

from dmdd_jax.data import layouts
from dmdd_jax.data.builders import base


class Builder(base.LayoutBuilder):
  """MPDD (Metal Parts Defect Detection), a config per category."""

  LAYOUT = 'mpdd'
  ARCHIVES = ('MPDD.zip',)
  LICENCE = 'not stated on its page: read what came with the download'
  HOMEPAGE = 'https://github.com/stepanje/MPDD'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the set from https://github.com/stepanje/MPDD'
    ' and put MPDD.zip or its unpacked folder'
    ' into manual_dir, or name the unpacked folder as manual_dir.'
  )
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name) for name in layouts.CATEGORIES['mpdd']
  ]
