"""Initial weights drawn by NumPy, from the distributions the modules declare.

Drawing them with jax compiles a random generator for every shape, half a minute
of processor time for a whole model; NumPy takes a fraction of a second and
gives the same values on every device.

Synopsis:

  abstract = jax.eval_shape(model.init, key, images)
  variables = initial.draw(abstract, seed=(0, 7))
"""

from collections.abc import Sequence
import math
from typing import Any
import zlib

import jax
import numpy as np
from scipy import special

# Standard deviation of a standard normal number between -2 and 2.
_TRUNCATED_STD = 0.87962566103423978


def draw(abstract: Any, seed: Sequence[int]) -> Any:
  """Values for a tree of shapes of parameters and statistics.

  Kernels of ResNet's convolutions are normal with variance 2 / fan-out, all
  others, those of the head outside its residual blocks, truncated normal with
  variance 1 / fan-in. Scales and variances are 1, biases and means 0. A leaf
  depends on the seed, its path and its shape alone.

  Args:
    abstract: {'params': ..., 'batch_stats': ...} of arrays or shapes.
    seed: integers >= 0.

  Returns:
    The same tree, of NumPy arrays.
  """

  def value(keys, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    path = [key.key for key in keys]
    if path[-1] != 'kernel':
      constant = {'scale': 1.0, 'var': 1.0, 'bias': 0.0, 'mean': 0.0}[path[-1]]
      return np.full(leaf.shape, constant, leaf.dtype)
    rng = np.random.default_rng([*seed, zlib.crc32('/'.join(path).encode())])
    area = math.prod(leaf.shape[:-2])
    if 'head' in path and not any(name.startswith('res_') for name in path):
      bound = special.ndtr(2.0)
      drawn = special.ndtri(rng.uniform(1.0 - bound, bound, leaf.shape))
      scale = math.sqrt(1.0 / (area * leaf.shape[-2])) / _TRUNCATED_STD
    else:
      drawn = rng.standard_normal(leaf.shape, np.float32)
      scale = math.sqrt(2.0 / (area * leaf.shape[-1]))
    return (scale * drawn).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(value, abstract)
