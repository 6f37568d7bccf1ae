"""Small models for tests, filled by numpy.

Drawing a ResNet's initial weights with jax takes far longer to compile than
anything a test does with them, and its batch-norm statistics are 0 and 1. The
values here have the scale of such weights and statistics that do something.
"""

import jax
import numpy as np

from configs import default
from dmdd_jax.models import dmdd
from dmdd_jax.training import train_state


def tiny_config(**changes):
  """The default configuration at 32 pixels, cheapest trunk, a small head.

  Args:
    **changes: fields to change, a double underscore for the dot
      (`head__kind='none'`).
  """
  config = default.get_config()
  config.data.image_size = 32
  config.teacher.weights = 'random'
  config.student.trunk = 'encoder'
  config.head.width = 4
  config.head.dilations = (1, 2)
  config.train.batch_size = 4
  # Muon's iterations would be half of what there is to compile.
  config.train.student.update({'kind': 'adam', 'learning_rate': 2e-3})
  config.train.total_steps = 40
  config.train.distill_steps = 20
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in changes.items()}
  )
  return config


def fill(abstract, seed=0):
  """Numpy values for a tree of shapes of parameters or statistics."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    name = path[-1].key
    if name == 'kernel':
      fan_in = max(leaf.size // leaf.shape[-1], 1)
      drawn = rng.normal(size=leaf.shape) * np.sqrt(2.0 / fan_in)
    elif name in ('scale', 'var'):
      drawn = rng.uniform(0.5, 1.5, size=leaf.shape)
    else:
      drawn = 0.1 * rng.normal(size=leaf.shape)
    return drawn.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(value, abstract)


def make_variables(model, image_size=32, seed=0):
  """Variables of a whole model."""
  abstract = jax.eval_shape(
    lambda: dmdd.init(model, jax.random.key(0), image_size)
  )
  return fill(abstract, seed)


def make_state(config, model, seed=0):
  """What `train_state.create` makes, filled by numpy."""
  abstract = jax.eval_shape(
    lambda: train_state.create(config, model, jax.random.key(0))
  )
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract.opt_state
  )
  return abstract.replace(
    step=np.zeros((), np.int32),
    params=fill(abstract.params, seed),
    batch_stats=fill(abstract.batch_stats, seed + 1),
    opt_state=zeros,
    teacher=fill(abstract.teacher, seed + 2),
  )


def make_batch(size=32, batch=4, seed=0):
  """Noise, a brighter patch painted into all rows but the last, its mask."""
  rng = np.random.default_rng(seed)
  normal = rng.uniform(0.0, 0.7, (batch, size, size, 3)).astype(np.float32)
  mask = np.zeros((batch, size, size, 1), np.float32)
  for row in range(batch - 1):
    side = size // 4 + 2 * row % (size // 2)
    mask[row, row : row + side, 4 : 4 + side] = 1.0
  image = np.where(mask > 0, normal[..., ::-1] * 0.5 + 0.4, normal)
  return {'image': image.astype(np.float32), 'normal': normal, 'mask': mask}


def count(tree):
  """Parameters in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def leaves_equal(a, b):
  """Bitwise, one bool per leaf."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return [np.array_equal(x, y, equal_nan=True) for x, y in pairs]
