"""Runs the images that wait for one model together.

Synopsis:

  batcher = batching.Batcher(model, device_thread)
  worker = asyncio.create_task(batcher.work())
  score, anomaly_map = await batcher.inspect(image)
"""

import asyncio
from collections.abc import Callable, Sequence
import concurrent.futures
from typing import Any

from absl import logging
import numpy as np

from dmdd_jax.serve import models as serve_models


class Batcher:
  """Runs what waits for one model, together, on the device's thread."""

  def __init__(
    self,
    model: serve_models.Model,
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
        results = await self._run([image for image, _ in batch])
      except Exception:  # One bad call must not end the service.
        logging.exception('%s: inference failed', self.model.source)
        results = [None] * len(batch)
      for (_, answer), result in zip(batch, results, strict=True):
        if answer.done():
          continue  # The client has gone.
        if result is None:
          answer.set_exception(
            serve_models.ModelError('the model failed; see the log')
          )
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
    results = []
    for _, score, values in zip(images, scores, maps, strict=True):
      if np.isfinite(score) and np.isfinite(values).all():
        results.append((float(score), values))
      else:
        logging.error('%s: a score or map is not finite', self.model.source)
        results.append(None)
    return results
