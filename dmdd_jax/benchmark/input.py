"""The suite `input`: pairs of the pipeline beside plain NumPy's."""

import numpy as np

from dmdd_jax.benchmark import common
from dmdd_jax.benchmark import measure


def run(options: measure.Options) -> list[measure.Figure]:
  """Pairs synthesised per second, against NumPy and OpenCV one by one."""
  size, batches, rows = options.size, 6, 32
  config = common.bench_config(size, batch_size=rows)
  iterator = common.dataset(config, batches * (options.repeats + 1))

  def ours():
    for _ in range(batches):
      next(iterator)

  images, textures = common.images(size)

  def theirs():
    rng = np.random.default_rng(0)
    for image in images:
      numpy_pair(image, textures, rng)

  mine = measure.measure(ours, options.repeats)
  usual = measure.measure(theirs, options.repeats)
  # Read: image and texture in bytes. Written: image, normal, mask in floats.
  moved = size * size * (2 * 3 + 4 * (3 + 3 + 1))
  pairs = batches * rows
  return [
    measure.rate(
      f'pairs of {size} x {size}',
      'pairs/s',
      pairs,
      mine,
      baseline=len(images) / usual.median,
      baseline_is='NumPy and OpenCV, pair by pair on one core',
      limit=measure.copy_bandwidth() / moved,
      limit_is='its bytes copied by one core',
    ),
    measure.Figure(
      'processor time of a pair',
      'ms',
      1e3 * mine.processor / pairs,
      baseline=1e3 * usual.processor / len(images),
      baseline_is='the same',
    ),
  ]


def numpy_pair(
  image: np.ndarray, textures: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """One Perlin-texture pair the usual way: the input suite's baseline."""
  import cv2

  size = image.shape[0]
  cells = 2 ** rng.integers(0, 6, 2)
  angles = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
  gradient = np.stack([np.sin(angles), np.cos(angles)], -1)
  y, x = np.meshgrid(
    np.arange(size) * cells[0] / size,
    np.arange(size) * cells[1] / size,
    indexing='ij',
  )
  row, column = y.astype(int), x.astype(int)
  fy, fx = y - row, x - column
  fade_y, fade_x = (t**3 * (t * (6 * t - 15) + 10) for t in (fy, fx))
  noise = np.zeros((size, size))
  for dy, wy in ((0, 1 - fade_y), (1, fade_y)):
    for dx, wx in ((0, 1 - fade_x), (1, fade_x)):
      corner = gradient[row + dy, column + dx]
      offset = corner[..., 0] * (fy - dy) + corner[..., 1] * (fx - dx)
      noise += wy * wx * offset
  center = ((size - 1) / 2, (size - 1) / 2)
  turn = cv2.getRotationMatrix2D(center, rng.uniform(-90, 90), 1.0)
  noise = cv2.warpAffine(np.sqrt(2) * noise, turn, (size, size))
  mask = (noise > 0.5)[..., None].astype(np.float32)
  texture = textures[rng.integers(len(textures))].astype(np.float32) / 255
  normal = image.astype(np.float32) / 255
  opacity = rng.uniform(0, 0.8)
  blend = (1 - opacity) * texture + opacity * normal
  return normal * (1 - mask) + blend * mask, mask
