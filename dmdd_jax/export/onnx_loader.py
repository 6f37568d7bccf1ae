"""Runs a file of `tools/export.py --format onnx`: onnxruntime, numpy, Pillow.

A copy of this file lies beside every exported file, as dmdd_onnx.py. It needs
nothing else of dmdd_jax.

Synopsis:

  model = dmdd_onnx.load('screw.onnx')
  for result in model.inspect(['new/a.png']):
    print(result.score, result.verdict, result.map.shape)
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import os
from typing import Any
import warnings

import numpy as np

# The second has a checksum; files of the first do not name their format.
FORMATS = ('dmdd_jax onnx 1', 'dmdd_jax onnx 2')
# Of the file's properties, all of them JSON but these.
_TEXTS = ('category', 'format', 'program_sha256')
_NEEDED = (*_TEXTS, 'image_threshold', 'input', 'pixel_threshold')
# Scores are spreads of normal pixels above their median: of the order of 1,
# and of a million where the pixels hardly differ.
_HIGHEST_THRESHOLD = 1e9
# The field of an ONNX file that holds its properties.
_PROPERTIES = 14


class OnnxFileError(ValueError):
  """A file is missing, damaged, no exported model, or cannot be run here."""


@dataclasses.dataclass(frozen=True)
class Result:
  """Score, verdict and map of one image.

  Attributes:
    score: image score, higher is more anomalous.
    verdict: 'defective' (score >= threshold), 'good', or 'uncalibrated'.
    map: (S, S) float32, higher is more anomalous.
  """

  score: float
  verdict: str
  map: np.ndarray


class Model:
  """An exported model in onnxruntime on the CPU.

  Attributes:
    metadata: category, input, thresholds and the rest of the properties.
    image_size: side S of images and maps, in pixels.
  """

  def __init__(self, session: Any):
    """Checks what the session says of itself.

    Raises:
      ValueError: it is not what `tools/export.py` writes.
    """
    self._session = session
    properties = session.get_modelmeta().custom_metadata_map
    self.metadata = {
      name: text if name in _TEXTS else _json_or_text(text)
      for name, text in properties.items()
    }
    nodes = {x.name: x for x in session.get_inputs() + session.get_outputs()}
    if missing := {'images', 'score', 'map'} - nodes.keys():
      raise ValueError(f'it has no {", ".join(sorted(missing))}')
    self.metadata.setdefault('format', FORMATS[0])
    self.image_size = side = check_metadata(self.metadata, FORMATS)
    for name, kind, shape in (
      ('images', 'tensor(uint8)', ['batch', side, side, 3]),
      ('score', 'tensor(float)', ['batch']),
      ('map', 'tensor(float)', ['batch', side, side]),
    ):
      node = nodes[name]
      if (node.type, node.shape) != (kind, shape):
        raise ValueError(
          f'{name} is {node.type} {node.shape}, not {kind} {shape}'
        )

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and maps (N, S, S) of uint8 images (N, S, S, 3), RGB."""
    scores, maps = self._session.run(['score', 'map'], {'images': images})
    return scores, maps

  def inspect(
    self, images: Sequence[str | os.PathLike | np.ndarray]
  ) -> Iterator[Result]:
    """Inspects files, or uint8 RGB arrays (H, W, 3), one by one.

    Raises:
      ValueError: see `read_image`; or a score is not finite.
    """
    from PIL import Image

    for image in images:
      if not isinstance(image, np.ndarray):
        image = read_image(image, self.metadata.get('white_level', 0))
      picture = Image.fromarray(image)
      side = (self.image_size, self.image_size)
      if picture.size != side:
        picture = picture.resize(side, Image.Resampling.BILINEAR)
      scores, maps = self(np.asarray(picture)[np.newaxis])
      yield Result(float(scores[0]), self.verdict(float(scores[0])), maps[0])

  def verdict(self, score: float) -> str:
    """'defective' (score >= threshold), 'good', or 'uncalibrated'.

    Raises:
      ValueError: the score is not finite.
    """
    threshold = self.metadata['image_threshold']
    if threshold is None:
      return 'uncalibrated'
    if not math.isfinite(score):
      raise ValueError(f'there is no verdict on the score {score}')
    return 'defective' if score >= threshold else 'good'


def load(path: str | os.PathLike) -> Model:
  """Opens a file of `tools/export.py --format onnx`, and runs it once.

  onnxruntime gets as many threads as this process has processors, and they do
  not spin while they wait.

  Raises:
    OnnxFileError: it is no such file, or its function or weights are not those
      that were compared with the checkpoint, or onnxruntime is missing.
  """
  path = os.fspath(path)
  try:
    import onnxruntime  # Of an extra.
  except ModuleNotFoundError as error:
    raise OnnxFileError(
      f"{path} needs the extra: pip install -e '.[onnx]'"
    ) from error
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = processors()
  options.add_session_config_entry('session.intra_op.allow_spinning', '0')
  try:
    with open(path, 'rb') as file:
      content = file.read()
    model = Model(
      onnxruntime.InferenceSession(
        content, options, providers=['CPUExecutionProvider']
      )
    )
    check_digest(model.metadata, program_digest(content))
    try_out(model, model.image_size)
    return model
  except Exception as error:  # onnxruntime's have no other class in common.
    raise OnnxFileError(
      f'{path} is no exported model that can be used ({error}); write it with'
      ' tools/export.py --format onnx'
    ) from error


def read_image(path: str | os.PathLike, white_level: int = 0) -> np.ndarray:
  """Reads an image file as training and `--mode predict` do.

  The EXIF orientation is applied. Transparent images are laid over black. The
  first of several frames is read.

  Args:
    path: the file.
    white_level: of 16-bit grey, the value that is white, as
      `Model.metadata['white_level']` has it; 0 is the full range.

  Returns:
    uint8 (H, W, 3), RGB.

  Raises:
    OSError: the file cannot be read.
    ValueError: it has 32-bit pixels, whose range is unknown, or values below 0.
  """
  from PIL import Image
  from PIL import ImageOps

  with Image.open(path) as file:
    source = file.format
    tags = getattr(file, 'tag_v2', {})
    # For Pillow a signed 16-bit TIFF has 32; the tags are BitsPerSample and
    # SampleFormat.
    signed = tags.get(258) == (16,) and tags.get(339) == (2,)
    image = ImageOps.exif_transpose(file)
  if image.mode[0] in 'IF':
    # Some versions of Pillow open 16-bit PNG and PPM as 'I'.
    known = signed or source in _16_BITS
    if image.mode == 'F' or (image.mode == 'I' and not known):
      raise ValueError(f'{path}: 32-bit pixels; expected 8 or 16 bits')
    white = white_level or (32767 if signed else 65535)
    values = np.minimum(np.asarray(image).astype(np.int64), white)
    if values.min(initial=0) < 0:
      raise ValueError(f'{path}: values below 0; expected 0 and above')
    values = (values * 255 + white // 2) // white
    image = Image.fromarray(values.astype(np.uint8))
  elif image.has_transparency_data:
    image = image.convert('RGBA')
    black = Image.new('RGBA', image.size, (0, 0, 0, 255))
    image = Image.alpha_composite(black, image)
  return np.asarray(image.convert('RGB'))


_16_BITS = ('PNG', 'PPM')


def check_metadata(metadata: dict[str, Any], formats: tuple[str, str]) -> int:
  """Checks what a file says of itself; a threshold of NaN becomes None.

  Args:
    metadata: of a file in one of the two formats.
    formats: that the loader reads; files of the first have no checksum.

  Returns:
    The side of its input.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """
  if metadata.get('format') == formats[0]:
    metadata['program_sha256'] = None
  if missing := [name for name in _NEEDED if name not in metadata]:
    raise ValueError(f'it does not say {", ".join(sorted(missing))}')
  if metadata['format'] not in formats:
    raise ValueError(
      f'it is of format {metadata["format"]!r}, this version reads'
      f' {formats[-1]!r}'
    )
  if not isinstance(metadata['category'], str):
    raise ValueError(f'category is {metadata["category"]!r}, not a name')
  for name in ('image_threshold', 'pixel_threshold'):
    metadata[name] = _threshold(name, metadata[name])
  white_level = metadata.setdefault('white_level', 0)
  if type(white_level) is not int or not 0 <= white_level <= 65535:
    raise ValueError(f'white_level is {white_level!r}, not 0 to 65535')
  entry = metadata['input']
  shape = entry.get('shape') if isinstance(entry, Mapping) else None
  side = shape[1] if isinstance(shape, list) and len(shape) == 4 else None
  if type(side) is not int or shape != ['batch', side, side, 3] or side < 1:
    raise ValueError(f"input.shape is {shape!r}, not ['batch', S, S, 3]")
  return side


def check_digest(metadata: Mapping[str, Any], digest: str) -> None:
  """Raises ValueError where function or weights are not those of the export."""
  if metadata['program_sha256'] is None:
    warnings.warn(
      f'the file of {metadata["category"]!r} was exported by an older version'
      ' and has no checksum: nobody sees whether its weights were changed.'
      ' Export it again.',
      stacklevel=2,
    )
  elif metadata['program_sha256'] != digest:
    raise ValueError(
      'its function or weights were changed after they were compared with the'
      ' checkpoint, so that the thresholds do not hold'
    )


def try_out(model: Any, side: int) -> None:
  """Raises ValueError where a model gives a grey image nothing that is finite.

  Args:
    model: uint8 images (N, S, S, 3) -> scores (N,), maps (N, S, S).
    side: S.
  """
  scores, maps = model(np.full((1, side, side, 3), 128, np.uint8))
  if scores.shape != (1,) or maps.shape != (1, side, side):
    raise ValueError(
      f'it gives scores {scores.shape} and maps {maps.shape} for one image of'
      f' {side} x {side} pixels'
    )
  if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
    raise ValueError('the score or map of a grey image is not finite')


def program_digest(content: bytes) -> str:
  """The SHA-256 of an ONNX file but for its properties.

  Raises:
    ValueError: it is no ONNX file.
  """
  view, position, digest = memoryview(content), 0, hashlib.sha256()
  while position < len(view):
    start = position
    key, position = _varint(view, position)
    value, position = _varint(view, position)
    if key & 7 == 2:  # Bytes of this length; else a number, read already.
      position += value
    elif key & 7 != 0:
      raise ValueError('it is no ONNX file')
    if key >> 3 != _PROPERTIES:
      digest.update(view[start:position])
  return digest.hexdigest()


def _varint(view: memoryview, position: int) -> tuple[int, int]:
  """A number of protobuf, and the position after it."""
  value = shift = 0
  while position < len(view) and shift < 64:
    byte = view[position]
    position += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, position
    shift += 7
  raise ValueError('it is no ONNX file')


def _threshold(name: str, value: Any) -> float | None:
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError(f'{name} is {value!r}, not a number')
  if math.isnan(value):
    return None
  if abs(value) > _HIGHEST_THRESHOLD:
    raise ValueError(
      f'{name} is {value}: no score comes near it; at most'
      f' {_HIGHEST_THRESHOLD:g} is expected'
    )
  return float(value)


def _json_or_text(text: str) -> Any:
  try:
    return json.loads(text)
  except ValueError:
    return text


def processors() -> int:
  """How many processors this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
