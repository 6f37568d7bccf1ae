"""What is served: trained models, and the batches their requests share.

A model is the folder of a trained category, or a file of tools/export.py; an
.onnx file needs neither jax nor Flax. Nothing here knows of HTTP.

Synopsis:

  model = serve_models.open_model('runs/mvtec/screw')
  batcher = serve_models.Batcher(model, device_thread)
  worker = asyncio.create_task(batcher.work())
  score, anomaly_map = await batcher.inspect(image)
"""

import asyncio
from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import math
import os
from typing import Any

from absl import logging
import numpy as np

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
  """

  category: str
  image_size: int
  batch_size: int
  image_threshold: float | None
  pixel_threshold: float | None
  run: Runner
  source: str

  def verdict(self, score: float) -> str:
    """'defective' (score >= threshold), 'good', or 'uncalibrated'.

    Raises:
      ValueError: the score is not finite.
    """
    if self.image_threshold is None:
      return 'uncalibrated'
    if not math.isfinite(score):
      raise ValueError(f'there is no verdict on the score {score}')
    return 'defective' if score >= self.image_threshold else 'good'


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


def _open_workdir(path: str) -> Model:
  from dmdd_jax import predict  # jax is not needed for .onnx files.

  return from_inspector(predict.load(path), path)


def from_inspector(inspector: Any, source: str) -> Model:
  """Serves a `predict.Inspector`; `source` names it in the log."""
  calibration = inspector.calibration

  def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = inspector(list(images))
    scores = np.array([result.score for result in found], np.float32)
    return scores, np.stack([result.map for result in found])

  return Model(
    category=inspector.config.data.category,
    image_size=inspector.config.data.image_size,
    batch_size=inspector.batch_size,
    image_threshold=_finite(calibration.image_threshold),
    pixel_threshold=_finite(calibration.pixel_threshold),
    run=run,
    source=source,
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

  # Here, and not while the first requests hold the device's thread.
  for rows in (1, _BATCH):
    run(np.zeros((rows, model.image_size, model.image_size, 3), np.uint8))
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
  )


def _finite(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


class Batcher:
  """Runs what waits for one model, together, on the device's thread."""

  def __init__(
    self,
    model: Model,
    device: concurrent.futures.Executor,
    observe: Callable[[int], Any] = lambda images: None,
  ):
    """Makes an empty queue.

    Args:
      model: what runs.
      device: its one thread runs one batch at a time, of all models.
      observe: is called with the number of images of each batch.
    """
    self.model = model
    self._device, self._observe = device, observe
    self._waiting: asyncio.Queue = asyncio.Queue()

  async def inspect(self, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Score and map (S, S) of a prepared image, uint8 (S, S, 3).

    Raises:
      ModelError: the model failed, or gave what is not finite.
    """
    answer = asyncio.get_running_loop().create_future()
    await self._waiting.put((image, answer))
    return await answer

  async def work(self) -> None:
    """Serves until it is cancelled."""
    while True:
      batch = [await self._waiting.get()]
      while len(batch) < self.model.batch_size and not self._waiting.empty():
        batch.append(self._waiting.get_nowait())
      try:
        found = await self._run([image for image, _ in batch])
      except Exception:  # One bad call must not end the service.
        logging.exception('%s: inference failed', self.model.source)
        found = [None] * len(batch)
      for (_, answer), result in zip(batch, found, strict=True):
        if answer.done():
          continue  # The client has gone.
        if result is None:
          answer.set_exception(ModelError('the model failed; see the log'))
        else:
          answer.set_result(result)

  async def _run(
    self, images: Sequence[np.ndarray]
  ) -> list[tuple[float, np.ndarray] | None]:
    """Score and map of each image; None where they are not finite."""
    self._observe(len(images))
    scores, maps = await asyncio.get_running_loop().run_in_executor(
      self._device, self.model.run, np.stack(images)
    )
    found = []
    for _, score, values in zip(images, scores, maps, strict=True):
      if np.isfinite(score) and np.isfinite(values).all():
        found.append((float(score), values))
      else:
        logging.error('%s: a score or map is not finite', self.model.source)
        found.append(None)
    return found
