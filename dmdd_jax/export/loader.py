"""Runs a file of `tools/export.py --format stablehlo`: jax and numpy alone.

Neither Flax, Orbax, TensorFlow nor Pillow is imported. `jax.export` itself
reads its format with `flatbuffers`, a small package of pure Python.

Synopsis:

  model = exported.load('screw.dmdd')
  scores, maps = model(images)    # uint8 (N, S, S, 3), RGB
  print(scores[0], model.verdict(scores[0]), model.metadata['input'])
"""

import hashlib
import json
import os

import jax
from jax import export as jax_export
import numpy as np

from dmdd_jax import verdict as verdict_lib
from dmdd_jax.export import onnx_loader

# The second has a checksum.
FORMATS = ('dmdd_jax stablehlo 1', 'dmdd_jax stablehlo 2')
FUNCTION, METADATA = '__function__', '__metadata__'


class ExportedFileError(ValueError):
  """A file is missing, damaged, or no exported model."""


class Model:
  """An exported model; can be called from any thread.

  Attributes:
    metadata: what the file says of itself: category, input, thresholds,
      versions, how it was verified.
    image_size: side S of images and maps, in pixels.
  """

  def __init__(
    self,
    metadata: dict,
    function: jax_export.Exported,
    weights: dict[str, np.ndarray],
  ):
    self.metadata = metadata
    self.image_size = onnx_loader.check_metadata(metadata, FORMATS)
    self._weights = jax.device_put(weights)
    self._call = jax.jit(function.call)

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inspects N images at once; each new N is compiled once.

    Args:
      images: uint8 (N, S, S, 3), RGB, S being `image_size`. How to bring an
        image to that size stands in `metadata['input']['resize']`.

    Returns:
      Scores (N,) and maps (N, S, S), float32, higher is more anomalous.

    Raises:
      ValueError: another type or shape.
    """
    images = np.asarray(images)
    shape = (self.image_size, self.image_size, 3)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
      raise ValueError(
        f'images must be uint8 (N, {", ".join(map(str, shape))}), are'
        f' {images.dtype} {images.shape}'
      )
    outputs = self._call(self._weights, images)
    return np.asarray(outputs['score']), np.asarray(outputs['map'])

  def verdict(self, score: float) -> str:
    """'defective' (score >= threshold), 'good', or 'uncalibrated'.

    Raises:
      ValueError: the score is not finite.
    """
    return verdict_lib.verdict(score, self.metadata['image_threshold'])


def load(path: str | os.PathLike) -> Model:
  """Reads a file of `tools/export.py --format stablehlo`, and runs it once.

  Raises:
    ExportedFileError: there is no such file, or it is no exported model, or its
      function or weights are not those that were compared with the checkpoint.
  """
  try:
    metadata, function, weights = _read(path)
    program = jax_export.deserialize(bytearray(function))
    model = Model(metadata, program, weights)
    digest = program_digest(function, weights)
    onnx_loader.check_digest(metadata, digest)
    onnx_loader.try_out(model, model.image_size)
    return model
  except Exception as error:  # Of numpy, zipfile, zlib, JSON or flatbuffers.
    raise ExportedFileError(
      f'{os.fspath(path)} is no exported model that can be used ({error!r});'
      ' write it with tools/export.py --format stablehlo'
    ) from error


def program_digest(function: bytes, weights: dict[str, np.ndarray]) -> str:
  """The SHA-256 of a function and its weights."""
  digest = hashlib.sha256(function)
  for name, array in sorted(weights.items()):
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _read(path: str | os.PathLike) -> tuple[dict, bytes, dict[str, np.ndarray]]:
  """Metadata, function and weights of an archive."""
  with np.load(path, allow_pickle=False) as archive:
    arrays = {name: archive[name] for name in archive.files}
  metadata = json.loads(arrays.pop(METADATA).tobytes())
  if not isinstance(metadata, dict):
    raise ValueError(f'its metadata are {type(metadata).__name__}, not a dict')
  return metadata, arrays.pop(FUNCTION).tobytes(), arrays
