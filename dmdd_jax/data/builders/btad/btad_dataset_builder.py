"""BTAD (beanTech Anomaly Detection): https://avires.dimi.uniud.it/papers/btad/btad.zip"""

import tensorflow_datasets as tfds

from dmdd_jax.data import layouts
from dmdd_jax.data.builders import base


class Builder(base.LayoutBuilder):
  """BTAD (beanTech Anomaly Detection), a config per category."""

  LAYOUT = 'btad'
  ARCHIVES = ('btad.zip',)
  LICENCE = 'CC BY-SA 4.0'
  HOMEPAGE = 'https://avires.dimi.uniud.it/papers/btad/btad.zip'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the set from https://avires.dimi.uniud.it/papers/btad/btad.zip'
    ' and put btad.zip or its unpacked folder'
    ' into manual_dir, or name the unpacked folder as manual_dir.'
  )
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name) for name in layouts.CATEGORIES['btad']
  ]
