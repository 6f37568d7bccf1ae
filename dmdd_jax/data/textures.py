"""What synthetic anomalies are filled with: images of a folder, DTD as
TensorFlow Datasets has prepared it, or procedural textures.

From the same DTD, folder and prepared set give the same textures.

Synopsis:

  fillings = textures.load('data/dtd/images', size=256, limit=1000, seed=0)
  fillings = textures.load('tfds:dtd', size=256, limit=1000, seed=0)
"""

from collections.abc import Iterator
import concurrent.futures
import heapq
import os

from absl import logging
import numpy as np

from dmdd_jax.data import files
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import surfaces

TFDS_DTD = 'tfds:dtd'
_PROCEDURAL = 200


def load(source: str, size: int, *, limit: int, seed: int) -> np.ndarray:
  """Loads textures, each the largest square at its centre, resized.

  Args:
    source: a folder, searched recursively; 'tfds:dtd'; or '' for procedural
      textures.
    size: height and width of the result.
    limit: at most so many, chosen by file name and seed; 0 is all of them, and
      200 procedural ones.
    seed: of the choice, or of the procedural textures.

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
    return surfaces.procedural_textures(count, size, seed)
  if source.startswith('tfds:'):
    found = _load_tfds(source, size, limit, seed)
  else:
    paths = records_lib.list_textures(source)
    found = records_lib.load_textures(paths, size, limit, seed)
  logging.info('%d textures from %s', len(found), source)
  return found


def _load_tfds(source: str, size: int, limit: int, seed: int) -> np.ndarray:
  """The textures of a prepared DTD, in the order of their file names."""
  if source != TFDS_DTD:
    raise ValueError(
      f'config.data.textures is {source!r}; of TensorFlow Datasets only'
      f' {TFDS_DTD!r} can be read'
    )
  examples = _examples(_prepared_dtd())
  if limit:
    examples = heapq.nsmallest(
      limit, examples, key=lambda example: files.draw(example[0], seed)
    )

  def decode(example: tuple[str, bytes]) -> np.ndarray:
    return records_lib.read_texture(example[0], size, example[1])

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
    raise records_lib.MissingDataError(
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
