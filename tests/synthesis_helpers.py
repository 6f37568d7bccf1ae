"""Options of the synthesis for tests."""

from configs import default
from dmdd_jax.data import synthesis


def perlin_options(**changes):
  """Perlin blobs in every image of 32 pixels, filled with textures alone."""
  plain = {'clean_share': 0.0, 'region_share': 0.0, 'self_share': 0.0}
  fields = {**default.get_config().synthesis.to_dict(), **plain, **changes}
  return synthesis.Options(**{'image_size': 32, **fields})
