"""What several suites measure on: a configuration, images, batches."""

import numpy as np


def bench_config(size: int = 256, batch_size: int = 8):
  """A configuration with random weights and generated surfaces."""
  from configs import default

  config = default.get_config()
  config.teacher.weights = 'random'
  config.data.image_size = size
  config.train.batch_size = batch_size
  return config


def images(size: int, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """Surfaces (N, S, S, 3) and procedural textures, uint8."""
  from dmdd_jax.data import surfaces
  from dmdd_jax.data import textures as textures_lib

  pictures = [surfaces.surface(str(i), size)[0] for i in range(count)]
  return np.stack(pictures), textures_lib.procedural_textures(count, size)


def dataset(config, steps: int):
  """An iterator over the batches of the real pipeline."""
  from dmdd_jax.data import pipeline

  pictures, textures = images(config.data.image_size)
  return pipeline.train_dataset(
    pictures,
    textures,
    pipeline.options(config),
    seed=0,
    batch_size=config.train.batch_size,
    total_steps=steps,
  ).as_numpy_iterator()
