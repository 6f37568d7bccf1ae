"""The tf.data pipeline of synthetic training pairs.

Images are decoded once and stay in memory as uint8. Step `n` takes the
positions n * B .. n * B + B - 1 of an endless sequence of epochs, each a
stateless shuffle of the examples, so any step's batch can be made without the
ones before it: a resumed run reads what the interrupted one would have.

Synopsis:

  dataset = pipeline.train_dataset(images, textures, options, seed=0,
                                   batch_size=32, total_steps=5000)
  for batch in dataset.as_numpy_iterator(): ...
"""

import ml_collections
import numpy as np
import tensorflow as tf

from dmdd_jax.data import synthesis
from dmdd_jax.data import tiles

# Rounds of the shuffle's cipher. The default, 4, leaves most of a small set in
# its order under a key of small numbers (seed 0); from 8 on it shuffles.
_SHUFFLE_ROUNDS = 16


def _examples(
  step: tf.Tensor,
  *,
  count: int,
  seed: int,
  batch_size: int,
  shard: tuple[int, int],
) -> tuple[tf.Tensor, tf.Tensor]:
  """(example, epoch), both (b,) int64, of one shard's rows of a step."""
  index, shards = shard
  rows = batch_size // shards
  positions = step * batch_size + index * rows + tf.range(rows, dtype=tf.int64)
  epochs, offsets = positions // count, positions % count

  # The raw op takes a seed per row, which tf.random's wrapper does not.
  zeros = tf.zeros_like(epochs)
  seeds = tf.stack([zeros + seed, epochs, zeros], axis=1)
  examples = tf.raw_ops.RandomIndexShuffle(
    index=offsets,
    seed=seeds,
    max_index=tf.constant(count - 1, tf.int64),
    rounds=_SHUFFLE_ROUNDS,
  )
  return examples, epochs


def train_dataset(
  images: np.ndarray,
  textures: np.ndarray,
  options: synthesis.Options,
  *,
  seed: int,
  batch_size: int,
  total_steps: int,
  first_step: int = 0,
  shard: tuple[int, int] = (0, 1),
  threads: int | None = None,
  foreground: np.ndarray | None = None,
) -> tf.data.Dataset:
  """Batches of synthetic pairs for the steps first_step .. total_steps - 1.

  Args:
    images: (N, S, S, 3) uint8 defect-free images, N >= 1.
    textures: (T, S, S, 3) uint8, T >= 1.
    options: of the synthesis; `options.image_size` is S.
    seed: of the order and the anomalies.
    batch_size: global, over all shards.
    total_steps: the step after the last.
    first_step: the step to begin with.
    shard: (index, count) of this process; it gets batch_size // count rows.
    threads: batches made at once; None lets tf.data choose.
    foreground: (N, S, S, 1) uint8 in {0, 1}, where anomalies may be; needed
      unless `options.foreground` is 'off'.

  Returns:
    A dataset of dicts: image, normal (b, S, S, 3) and mask (b, S, S, 1)
    float32, label (b,) int32 (1 = the mask is not empty), _mask (b,) float32
    of ones, view (b,) int32, which of `views` the normal image is (without
    meaning where `options.rotate_degrees` turns it further).

  Raises:
    ValueError: no images or textures, sizes that disagree, foregrounds that
      are missing, or a batch that does not divide over the shards.
  """
  _check(images, textures, foreground, options, batch_size, shard)
  if options.foreground == 'off':
    foreground = None
  with tf.device('cpu'):
    images, textures = tf.constant(images), tf.constant(textures)
    if foreground is not None:
      foreground = tf.constant(foreground)

  # No Python control flow here looks at a tensor: seconds of each start saved.
  @tf.autograph.experimental.do_not_convert
  def make_batch(step: tf.Tensor) -> dict[str, tf.Tensor]:
    examples, epochs = _examples(
      step,
      count=images.shape[0],
      seed=seed,
      batch_size=batch_size,
      shard=shard,
    )
    return _batch(images, textures, foreground, options, seed, examples, epochs)

  steps = tf.data.Dataset.range(first_step, total_steps)
  dataset = steps.map(
    make_batch,
    num_parallel_calls=threads or tf.data.AUTOTUNE,
    deterministic=True,
  )
  return dataset.prefetch(2)


def _check(
  images: np.ndarray,
  textures: np.ndarray,
  foreground: np.ndarray | None,
  options: synthesis.Options,
  batch_size: int,
  shard: tuple[int, int],
) -> None:
  """Raises ValueError as `train_dataset` says."""
  size = options.image_size
  for name, array in (('images', images), ('textures', textures)):
    if array.shape[1:] != (size, size, 3) or not len(array):
      raise ValueError(
        f'{name} must be (>= 1, {size}, {size}, 3), are {array.shape}'
      )
  shape = None if foreground is None else foreground.shape
  if options.foreground != 'off' and shape != (*images.shape[:3], 1):
    raise ValueError(
      f'config.synthesis.foreground is {options.foreground!r}: foreground must'
      f' be {(*images.shape[:3], 1)}, is {shape}'
    )
  if batch_size % shard[1]:
    raise ValueError(
      f'config.train.batch_size = {batch_size} does not divide over'
      f' {shard[1]} processes'
    )


def _batch(
  images: tf.Tensor,
  textures: tf.Tensor,
  foreground: tf.Tensor | None,
  options: synthesis.Options,
  seed: int,
  examples: tf.Tensor,
  epochs: tf.Tensor,
) -> dict[str, tf.Tensor]:
  """The batch of these examples, each in an epoch, as `train_dataset` says."""
  draws = synthesis.draw(seed, examples, epochs)
  normal = tf.cast(tf.gather(images, examples), tf.float32) / 255.0
  normal = synthesis.augment(normal, draws, options)
  normal = synthesis.light(normal, draws, options)
  inside = None
  if foreground is not None:
    inside = tf.cast(tf.gather(foreground, examples), tf.float32)
    inside = synthesis.augment(inside, draws, options)
  image, mask = synthesis.synthesize(normal, textures, draws, options, inside)
  label = tf.cast(tf.reduce_max(mask, axis=(1, 2, 3)), tf.int32)
  view = tf.cast(examples, tf.int32)
  if options.rotate_90:
    view = 4 * view + synthesis.quarters(draws, options)
  return {
    'image': image,
    'normal': normal,
    'mask': mask,
    'label': label,
    '_mask': tf.ones_like(label, tf.float32),
    'view': view,
  }


def views(images: np.ndarray, options: synthesis.Options) -> np.ndarray:
  """All normal images of `train_dataset`, but for small rotations.

  Args:
    images: (N, S, S, 3) uint8.
    options: of the synthesis.

  Returns:
    (N, S, S, 3) uint8, or with `options.rotate_90` (4 N, S, S, 3): each image
    rotated by 0, 1, 2 and 3 quarters.
  """
  if not options.rotate_90:
    return images
  # The middle of the draws for no small rotation and 0, 1, 2, 3 quarters.
  turn = np.stack([np.full(4, 0.5), (np.arange(4) + 0.5) / 4], axis=1)
  all_views = []
  for image in images:
    copies = tf.constant(np.repeat(image[None], 4, axis=0), tf.float32) / 255.0
    draws = {'turn': tf.constant(turn, tf.float32)}
    rotated = synthesis.augment(copies, draws, options)
    all_views.append(np.rint(255.0 * rotated.numpy()).astype(np.uint8))
  return np.concatenate(all_views)


def options(config: ml_collections.ConfigDict) -> synthesis.Options:
  """The synthesis options of a config."""
  return synthesis.Options(
    image_size=tiles.input_side(config.data), **config.synthesis
  )
