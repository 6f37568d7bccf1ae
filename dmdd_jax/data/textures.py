"""Textures that fill synthetic anomalies.

They come from a folder of images, from DTD as prepared by TensorFlow Datasets,
or they are procedural. DTD gives the same textures from its folder and from the
prepared set.

Synopsis:

  fillings = textures.load('data/dtd/images', size=256, limit=1000, seed=0)
  fillings = textures.load('tfds:dtd', size=256, limit=1000, seed=0)
"""

from collections.abc import Iterable, Iterator, Sequence
import concurrent.futures
import heapq
import os

from absl import logging
import numpy as np
from PIL import Image
from PIL import ImageOps

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import noise

TFDS_DTD = 'tfds:dtd'
_PROCEDURAL = 200
# Threads that draw textures: a few take 90 times a texture's memory.
_WORKERS = 4


def load(source: str, size: int, *, limit: int, seed: int) -> np.ndarray:
  """Loads textures, each the largest square at its centre, resized.

  Args:
    source: a folder, searched recursively; 'tfds:dtd'; or '' for procedural
      textures.
    size: height and width of the result.
    limit: the highest number T of textures, chosen by file name and seed; 0 for
      all images of the source, or 200 procedural textures.
    seed: seed of the choice, or of the procedural textures.

  Returns:
    uint8 (T, size, size, 3) in [0, 255].

  Raises:
    MissingDataError, DatasetError, BadImageError: nothing usable is there.
  """
  if not source:
    count = min(limit or _PROCEDURAL, _PROCEDURAL)
    logging.info(
      'config.data.textures is not set: anomalies are filled with %d'
      ' procedural textures',
      count,
    )
    return procedural_textures(count, size, seed)
  if source.startswith('tfds:'):
    textures = _load_tfds(source, size, limit, seed)
  else:
    paths = list_textures(source)
    textures = load_textures(paths, size, limit, seed)
  logging.info('%d textures from %s', len(textures), source)
  return textures


def _load_tfds(source: str, size: int, limit: int, seed: int) -> np.ndarray:
  """The textures of a prepared DTD, in the order of their file names."""
  if source != TFDS_DTD:
    raise ValueError(
      f'config.data.textures is {source!r}; of TensorFlow Datasets only'
      f' {TFDS_DTD!r} can be read'
    )
  examples: Iterable[tuple[str, bytes]] = _examples(_prepared_dtd())
  if limit:
    examples = heapq.nsmallest(
      limit, examples, key=lambda example: files.draw(example[0], seed)
    )

  def decode(example: tuple[str, bytes]) -> np.ndarray:
    return read_texture(example[0], size, example[1])

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return np.stack(list(pool.map(decode, sorted(examples))))


def _prepared_dtd() -> str:
  """The folder of the newest prepared version.

  Raises:
    MissingDataError: there is none.
  """
  home = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  folder = os.path.join(files.absolute(home), 'dtd')
  versions = [
    name
    for name in (files.folders(folder) if os.path.isdir(folder) else ())
    if name.replace('.', '').isdigit()
    and os.path.isfile(os.path.join(folder, name, 'dataset_info.json'))
  ]
  if not versions:
    raise files.MissingDataError(
      f'config.data.textures is {TFDS_DTD!r}: found no prepared set in'
      f' {folder}. Prepare it (`tfds build dtd`, which downloads it), set'
      ' TFDS_DATA_DIR to where it is, or set --config.data.textures to a'
      " folder of DTD's images."
    )
  newest = max(versions, key=lambda v: [int(n) for n in v.split('.')])
  return os.path.join(folder, newest)


def _examples(folder: str) -> Iterator[tuple[str, bytes]]:
  """(file name, encoded image) of every example of all splits."""
  import tensorflow_datasets as tfds  # Takes seconds to import.

  builder = tfds.builder_from_directory(folder)
  splits = builder.as_dataset(
    split='+'.join(builder.info.splits),
    decoders={'image': tfds.decode.SkipDecoding()},
  )
  for example in splits.as_numpy_iterator():
    yield example['file_name'].decode(), example['image']


def list_textures(root: str | os.PathLike) -> tuple[str, ...]:
  """Returns the sorted paths of all images in a folder and those below it.

  For DTD give its root or its images/ folder. Links are followed; hidden files
  and folders are ignored.

  Raises:
    MissingDataError: the folder is missing.
    DatasetError: there is no image in it.
  """
  folder = files.absolute(root)
  hint = (
    'Set --config.data.textures to a folder of images, or leave it empty for '
    'procedural textures.'
  )
  if not os.path.isdir(folder):
    kind = 'a file' if os.path.exists(folder) else 'nothing'
    raise files.MissingDataError(
      f'Texture folder {folder}: found {kind}, expected a folder of images'
      f' (any depth). {hint}'
    )
  paths = files.images_below(folder)
  if not paths:
    raise files.DatasetError(
      f'Texture folder {folder}: found no image, expected at least one'
      f' file of {", ".join(files.FORMATS)} (any depth). {hint}'
    )
  return paths


def load_textures(
  paths: Sequence[str],
  size: int,
  limit: int = 0,
  seed: int = 0,
  num_threads: int = 0,
) -> np.ndarray:
  """Reads textures, each the largest square at its centre, resized.

  Args:
    paths: the files.
    size: height and width of the result.
    limit: the highest number of textures, chosen by file name and seed; 0 for
      all.
    seed: seed of the choice.
    num_threads: threads that decode; 0 for one per processor.

  Returns:
    uint8 (T, size, size, 3) in [0, 255], T = min(limit, len(paths)), in the
    order of the sorted paths.

  Raises:
    BadImageError: a chosen file cannot be read.
  """
  paths = sorted(paths)
  if limit and limit < len(paths):
    paths = sorted(
      sorted(paths, key=lambda path: files.draw(path, seed))[:limit]
    )
  textures = np.zeros((len(paths), size, size, 3), np.uint8)

  def fill(index: int) -> None:
    textures[index] = read_texture(paths[index], size)

  images_lib.map_threads(fill, range(len(paths)), num_threads)
  return textures


def read_texture(
  path: str, size: int, encoded: bytes | None = None
) -> np.ndarray:
  """Reads the largest square at an image's centre, resized.

  Args:
    path: the file.
    size: height and width of the result.
    encoded: the content of the file, if it is in memory already; the path then
      only names it in errors.

  Returns:
    uint8 (size, size, 3) in [0, 255].

  Raises:
    BadImageError: it cannot be read.
  """
  try:
    image = images_lib.decode_file(path, encoded)
  except files.BadImageError as error:
    raise files.BadImageError(
      f'Texture {error}. Remove it from the textures.'
    ) from None
  return np.asarray(
    ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
  )


def procedural_textures(count: int, size: int, seed: int = 0) -> np.ndarray:
  """Makes coloured textures to cut synthetic anomalies from.

  Noise of several scales and directions, stripes, checks, cells, dots and
  marble, in turn. A texture depends on size, seed and its index alone.

  Args:
    count: number T of textures.
    size: height and width.
    seed: any integer.

  Returns:
    uint8 (T, size, size, 3) in [0, 255].
  """
  patterns = (_cloudy, _striped, _checked, _cellular, _dotted, _marbled)
  textures = np.zeros((count, size, size, 3), np.uint8)

  def make(index: int) -> None:
    rng = noise.generator(seed, f'texture/{index}')
    pattern = patterns[index % len(patterns)](rng, size)
    textures[index] = _coloured(rng, pattern)

  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    list(pool.map(make, range(count)))
  return textures


def _coloured(rng: np.random.Generator, pattern: np.ndarray) -> np.ndarray:
  """Maps a pattern (S, S) in [0, 1] to a ramp of three colours, with grain."""
  size = pattern.shape[0]
  while True:
    ramp = rng.uniform(0.05, 0.95, (3, 3))
    grey = ramp.mean(axis=1, keepdims=True)
    ramp = grey + (ramp - grey) * rng.uniform(0, 1) ** 1.5
    if np.abs(ramp[0] - ramp[2]).max() > 0.3:
      break
  image = np.stack(
    [np.interp(pattern, (0, 0.5, 1), ramp[:, channel]) for channel in range(3)],
    axis=-1,
  )
  grain = rng.uniform(0, 0.08) * noise.band_limited(
    rng, size, size / rng.uniform(3, 10)
  )
  image = image + grain[..., np.newaxis]
  return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _plane(
  rng: np.random.Generator, size: int, wobble: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns turned and wobbled coordinates, two of (S, S), about in [0, 1)."""
  y, x = np.meshgrid(*2 * [np.arange(size) / size], indexing='ij')
  angle = rng.uniform(0, np.pi)
  u = (
    np.cos(angle) * x
    + np.sin(angle) * y
    + wobble * noise.band_limited(rng, size, 3)
  )
  v = (
    np.cos(angle) * y
    - np.sin(angle) * x
    + wobble * noise.band_limited(rng, size, 3)
  )
  return u, v


def _wave(phase: np.ndarray, hardness: float) -> np.ndarray:
  """Returns a wave of period 1 in [0, 1]; the harder, the squarer."""
  wave = np.sin(2 * np.pi * phase)
  return 0.5 + 0.5 * np.tanh(hardness * wave) / np.tanh(hardness)


def _cloudy(rng: np.random.Generator, size: int) -> np.ndarray:
  field = noise.band_limited(
    rng,
    size,
    np.exp(rng.uniform(np.log(3), np.log(size / 5))),
    stretch=np.exp(rng.uniform(0, np.log(8))),
    angle=rng.uniform(0, np.pi),
    octaves=rng.uniform(0.3, 1.2),
  )
  return np.clip(0.5 + rng.uniform(0.2, 0.5) * field, 0, 1)


def _striped(rng: np.random.Generator, size: int) -> np.ndarray:
  u, _ = _plane(rng, size, rng.choice((0.0, 0.01, 0.03)))
  cycles = np.exp(rng.uniform(np.log(4), np.log(size / 5)))
  return _wave(u * cycles, rng.uniform(0.5, 6))


def _checked(rng: np.random.Generator, size: int) -> np.ndarray:
  u, v = _plane(rng, size, rng.choice((0.0, 0.005, 0.02)))
  cycles = np.exp(rng.uniform(np.log(3), np.log(size / 6), 2))
  hardness = rng.uniform(0.5, 6)
  a, b = _wave(u * cycles[0], hardness), _wave(v * cycles[1], hardness)
  return (a + b) / 2 if rng.random() < 0.5 else a * b + (1 - a) * (1 - b)


def _cell_distances(
  rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """Draws random seeds of cells and measures each pixel's distance to them.

  The seeds repeat with the picture, which can be tiled.

  Returns:
    (S, S) distance to the nearest seed, (S, S) distance to the second nearest,
    both in mean distances between seeds; (S, S) index of the nearest seed; and
    the number of seeds.
  """
  count = int(rng.integers(12, 90))
  seeds = rng.random((count, 2)).astype(np.float32)
  grid = (np.arange(size, dtype=np.float32) + 0.5) / size
  gap = np.abs(grid - seeds[..., np.newaxis])  # (count, 2, S)
  gap = np.minimum(gap, 1 - gap) ** 2
  square = gap[:, 0, :, np.newaxis] + gap[:, 1, np.newaxis, :]
  index = square.argmin(axis=0)
  first = square.min(axis=0)
  np.put_along_axis(square, index[np.newaxis], np.inf, axis=0)
  second = square.min(axis=0)
  return np.sqrt(first * count), np.sqrt(second * count), index, count


def _cellular(rng: np.random.Generator, size: int) -> np.ndarray:
  first, second, index, count = _cell_distances(rng, size)
  style = rng.integers(3)
  if style == 0:  # Plates with joints.
    joint = np.clip((second - first) / rng.uniform(0.08, 0.3), 0, 1)
    return joint * rng.uniform(0.3, 1, count)[index]
  if style == 1:  # Flat cells.
    return rng.random(count)[index]
  return np.clip(first / rng.uniform(0.7, 1.2), 0, 1)  # Pebbles.


def _dotted(rng: np.random.Generator, size: int) -> np.ndarray:
  if rng.random() < 0.5:  # Irregular.
    first, _, index, count = _cell_distances(rng, size)
    radius = rng.uniform(0.15, 0.45, count)[index]
    return np.clip((radius - first) * size / 8 + 0.5, 0, 1)
  u, v = _plane(rng, size, rng.choice((0.0, 0.01)))
  cycles = np.exp(rng.uniform(np.log(4), np.log(size / 6)))
  u, v = (u * cycles) % 1 - 0.5, (v * cycles) % 1 - 0.5
  edge = rng.uniform(0.15, 0.4) - np.hypot(u, v)
  return np.clip(edge * size / cycles + 0.5, 0, 1)


def _marbled(rng: np.random.Generator, size: int) -> np.ndarray:
  u, _ = _plane(rng, size, rng.uniform(0.02, 0.08))
  fine = noise.band_limited(rng, size, rng.uniform(6, 14), octaves=1.0)
  phase = u * rng.uniform(2, 8) + rng.uniform(0.1, 0.3) * fine
  return np.abs(2 * (phase % 1) - 1) ** rng.uniform(0.4, 1.5)
