"""KolektorSDD2: https://www.vicos.si/resources/kolektorsdd2/"""

import tensorflow_datasets as tfds

from dmdd_jax.data import layouts
from dmdd_jax.data.builders import base


class Builder(base.LayoutBuilder):
  """KolektorSDD2, a config per category."""

  LAYOUT = 'kolektorsdd2'
  ARCHIVES = ('KolektorSDD2.zip',)
  LICENCE = 'CC BY-NC-SA 4.0'
  HOMEPAGE = 'https://www.vicos.si/resources/kolektorsdd2/'
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Get the set from https://www.vicos.si/resources/kolektorsdd2/'
    ' and put KolektorSDD2.zip or its unpacked folder'
    ' into manual_dir, or name the unpacked folder as manual_dir.'
  )
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name)
    for name in layouts.CATEGORIES['kolektorsdd2']
  ]
