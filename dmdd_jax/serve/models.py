"""What is served: trained models, from folders and exported files.

A model is the folder of a trained category, or a file of tools/export.py; an
.onnx file needs neither jax nor Flax. Nothing here knows of HTTP.

Synopsis:

  model = serve_models.open_model('runs/mvtec/screw')
  scores, maps = model.run(images)  # uint8 (N, S, S, 3)
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
from typing import Any

import numpy as np

from dmdd_jax import verdict as verdict_lib
from dmdd_jax.export import onnx_loader

_BATCH = 16  # Of exported files; a checkpoint has its own.

# Prepared uint8 images (N, S, S, 3) in, scores (N,) and maps (N, S, S) out.
Runner = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Model:
  """A trained model that can be served.

  Attributes:
    category: its name in requests.
    image_size: side of its input.
    batch_size: how many images it takes at once.
    image_threshold: of the verdict; None if not calibrated.
    pixel_threshold: of the outline; None if not calibrated.
    run: called from one thread at a time.
    source: where it came from.
    white_level: by which its 16-bit files are read, see `images.read_image`.
  """

  category: str
  image_size: int
  batch_size: int
  image_threshold: float | None
  pixel_threshold: float | None
  run: Runner
  source: str
  white_level: int = 0

  def verdict(self, score: float) -> str:
    """See `verdict.verdict`."""
    return verdict_lib.verdict(score, self.image_threshold)


class ModelError(RuntimeError):
  """The model failed on an image; the log says how."""


def open_model(path: str | os.PathLike) -> Model:
  """Opens a category's folder, or a file of tools/export.py.

  Raises:
    FileNotFoundError, CheckpointError, ExportedFileError, OnnxFileError:
      nothing usable.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    return _open_workdir(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f'{path}: there is no such folder of a trained category, nor such a file'
      ' of tools/export.py'
    )
  if not path.endswith('.onnx'):
    return _open_stablehlo(path)
  model = onnx_loader.load(path)
  return _from_metadata(model.metadata, model, path)


def with_thresholds(
  models: Sequence[Model], path: str | os.PathLike
) -> list[Model]:
  """Models with other thresholds: those of a file, else their own.

  Args:
    models: of different categories.
    path: JSON, {CATEGORY: {'image_threshold': 0.6, 'pixel_threshold': 0.5}};
      the page offers such a file. A threshold that is missing is not changed.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it holds anything else, or a category that is not served.
  """
  path = os.fspath(path)
  with open(path, encoding='utf-8') as file:
    try:
      document = json.load(file)
    except ValueError as error:
      raise ValueError(f'{path} is not JSON: {error}') from None
  served = {model.category: model for model in models}
  if not isinstance(document, dict) or not document.keys() <= served.keys():
    raise ValueError(
      f'{path} has {document!r:.200}, expected thresholds by category, of'
      f' {sorted(served)}'
    )
  for category, values in document.items():
    fields = ('image_threshold', 'pixel_threshold')
    if not isinstance(values, dict) or not values.keys() <= set(fields):
      raise ValueError(
        f'{path}: {category} has {values!r:.200}, expected'
        f' {" and ".join(fields)}'
      )
    for name, value in values.items():
      verdict_lib.check_threshold(f'{path}: {category}.{name}', value)
    own = {
      name: verdict_lib.threshold_or_none(value)
      for name, value in values.items()
    }
    served[category] = dataclasses.replace(served[category], **own)
  return list(served.values())


def _open_workdir(path: str) -> Model:
  from dmdd_jax import predict  # jax is not needed for .onnx files.

  return from_inspector(predict.load(path), path)


def from_inspector(inspector: Any, source: str) -> Model:
  """Serves a `predict.Inspector`; `source` names it in the log."""
  calibration = inspector.calibration

  def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    results = inspector.inspect(images)
    scores = np.array([result.score for result in results], np.float32)
    return scores, np.stack([result.map for result in results])

  return Model(
    category=inspector.config.data.category,
    image_size=inspector.config.data.image_size,
    batch_size=inspector.batch_size,
    image_threshold=verdict_lib.threshold_or_none(calibration.image_threshold),
    pixel_threshold=verdict_lib.threshold_or_none(calibration.pixel_threshold),
    run=run,
    source=source,
    white_level=inspector.config.data.white_level,
  )


def _open_stablehlo(path: str) -> Model:
  from dmdd_jax.export import loader

  model = loader.load(path)

  def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Each batch size is compiled: there are two of them.
    rows = 1 if len(images) == 1 else _BATCH
    padded = np.zeros((rows, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    scores, maps = model(padded)
    return scores[: len(images)], maps[: len(images)]

  # Here, and not while the first requests hold the device's thread; one image
  # alone has been run by the loader.
  run(np.zeros((_BATCH, model.image_size, model.image_size, 3), np.uint8))
  return _from_metadata(model.metadata, run, path)


def _from_metadata(metadata: dict[str, Any], run: Runner, path: str) -> Model:
  return Model(
    category=metadata['category'],
    image_size=metadata['input']['shape'][1],
    batch_size=_BATCH,
    image_threshold=metadata['image_threshold'],
    pixel_threshold=metadata['pixel_threshold'],
    run=run,
    source=path,
    white_level=metadata['white_level'],
  )
