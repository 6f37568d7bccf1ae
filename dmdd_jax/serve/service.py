"""From a request to its answer: admission, reading, decoding, the model."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
import concurrent.futures
import contextlib

from absl import logging
import fastapi
import numpy as np
from starlette import requests

from dmdd_jax.export import onnx_loader
from dmdd_jax.serve import batching
from dmdd_jax.serve import decoding
from dmdd_jax.serve import feedback as feedback_lib
from dmdd_jax.serve import limits as limits_lib
from dmdd_jax.serve import metrics as metrics_lib
from dmdd_jax.serve import models as serve_models
from dmdd_jax.serve import regions as regions_lib
from dmdd_jax.serve import schema
from dmdd_jax.serve import security
from dmdd_jax.serve import worker

_DECODERS = 4  # Each may hold an image of `Limits.pixels`.
# Headers and, for JSON, quotes and line breaks around what an image takes.
_OVERHEAD = 2**16


class Service:
  """The state behind the routes of an application."""

  def __init__(
    self,
    models: Sequence[serve_models.Model],
    limits: limits_lib.Limits,
    token: str,
    keep: feedback_lib.Keep | None = None,
  ):
    security.check_token(token)
    self.limits, self.token, self.keep = limits, token, keep
    self.metrics = metrics_lib.Metrics()
    self.waiting = 0
    self._held = 0  # Bytes of the bodies that are read or decoded.
    # The device works on one batch at a time; decoding runs beside it.
    self._device = concurrent.futures.ThreadPoolExecutor(1)
    self._decoders: decoding.Decoders | None = None
    self._threads = concurrent.futures.ThreadPoolExecutor(_DECODERS)
    self.batchers = {
      model.category: batching.Batcher(
        model, self._device, self.metrics.batches.observe
      )
      for model in models
    }
    self._workers: list[asyncio.Task] = []

  @property
  def works(self) -> bool:
    """Whether every model is served."""
    return not any(task.done() for task in self._workers)

  @contextlib.asynccontextmanager
  async def lifespan(self, app: fastapi.FastAPI) -> AsyncIterator[None]:
    """Works while the application runs."""
    del app
    self._decoders = decoding.Decoders(
      min(_DECODERS, onnx_loader.processors()), self.limits
    )
    self._workers = [
      asyncio.create_task(x.work()) for x in self.batchers.values()
    ]
    try:
      yield
    finally:
      for task in self._workers:
        task.cancel()
      self._decoders.close()
      self._device.shutdown()
      self._threads.shutdown()

  def batcher(self, category: str | None) -> batching.Batcher:
    """Of a category; with one model it need not be named."""
    if category is None and len(self.batchers) == 1:
      return next(iter(self.batchers.values()))
    if category not in self.batchers:
      known = ' or '.join(f'?category={x}' for x in sorted(self.batchers))
      wrong = 'no category is named' if category is None else repr(category)
      raise fastapi.HTTPException(404, f'{wrong}; add {known}')
    return self.batchers[category]

  async def inspect(
    self, request: requests.Request, query: schema.InspectQuery
  ) -> schema.Inspection:
    """Reads, decodes, waits for the device, answers."""
    batcher, image, score, values = await self._score(
      request, query.category, preview=query.preview
    )
    model, verdict = batcher.model, batcher.model.verdict(score)
    regions = await asyncio.get_running_loop().run_in_executor(
      self._threads,
      regions_lib.find,
      values,
      model.pixel_threshold,
      image.height,
      image.width,
    )
    self.metrics.verdicts.labels(model.category, verdict).inc()
    return schema.Inspection(
      category=model.category,
      score=score,
      verdict=verdict,
      image_threshold=model.image_threshold,
      pixel_threshold=model.pixel_threshold,
      height=image.height,
      width=image.width,
      map=schema.encode_map(values, query.map),
      regions=regions,
      preview=base64.b64encode(image.preview).decode() or None,
    )

  async def take_feedback(
    self, request: requests.Request, query: schema.FeedbackQuery
  ) -> schema.Feedback:
    """Inspects an image again, and keeps it with an operator's opinion."""
    if self.keep is None:
      # Read and dropped, as in `_score`.
      await self._read(request, bytearray())
      security.authorize(request.headers, self.token)
      raise fastapi.HTTPException(
        404, 'opinions are not kept; start the server with --feedback DIR'
      )
    batcher, image, score, _ = await self._score(
      request, query.category, keep=True
    )
    category, verdict = batcher.model.category, batcher.model.verdict(score)
    opinion = {'opinion': query.opinion, 'reason': query.reason}
    request.state.entry |= opinion
    fields = {**request.state.entry, 'name': query.name}
    try:
      file = await asyncio.get_running_loop().run_in_executor(
        self._threads, self.keep, category, query.opinion, image.content, fields
      )
    except OSError as error:
      logging.error('--feedback: an opinion was not kept: %s', error)
      raise fastapi.HTTPException(
        507, f'the opinion was not kept: {error.strerror}'
      ) from error
    return schema.Feedback(
      category=category, file=file, score=score, verdict=verdict
    )

  async def _score(
    self,
    request: requests.Request,
    category: str | None,
    preview: bool = False,
    keep: bool = False,
  ) -> tuple[batching.Batcher, decoding.Decoded, float, np.ndarray]:
    """The image of a request, its score and its map."""
    try:
      batcher = self._admit(request, category)
    except fastapi.HTTPException:
      # Read and dropped, so that the client gets to read the answer.
      await self._read(request, bytearray())
      raise
    self.waiting += 1
    self.metrics.waiting.set(self.waiting)
    try:
      image = await self._decode(request, batcher.model, preview, keep)
      score, values = await batcher.inspect(image.pixels)
    except worker.Refusal as refusal:
      raise fastapi.HTTPException(refusal.status, str(refusal)) from refusal
    except serve_models.ModelError as error:
      raise fastapi.HTTPException(500, str(error)) from error
    finally:
      self.waiting -= 1
      self.metrics.waiting.set(self.waiting)
    model = batcher.model
    request.state.entry |= {
      'category': model.category,
      'model': model.source,
      'image_threshold': model.image_threshold,
      'sha256': image.sha256,
      'score': score,
      'verdict': model.verdict(score),
    }
    return batcher, image, score, values

  def _admit(
    self, request: requests.Request, category: str | None
  ) -> batching.Batcher:
    """What can be refused by the headers."""
    security.authorize(request.headers, self.token)
    if self.waiting >= self.limits.waiting:
      raise _too_many(f'{self.limits.waiting} requests are waiting')
    kind = _kind(request)
    if kind not in ('multipart/form-data', 'application/json'):
      raise fastapi.HTTPException(
        415,
        f'Content-Type is {kind!r}; send multipart/form-data or'
        ' application/json',
      )
    return self.batcher(category)

  async def _decode(
    self,
    request: requests.Request,
    model: serve_models.Model,
    preview: bool,
    keep: bool,
  ) -> decoding.Decoded:
    """The image in a body, at the model's size."""
    scale = 4 / 3 if _kind(request) == 'application/json' else 1.0  # Base64.
    # Base64 in lines of 76 letters has two more for each.
    limit = int(self.limits.bytes * scale * 78 / 76) + _OVERHEAD
    body = bytearray()
    try:
      await self._read(request, body, limit)
      return await asyncio.get_running_loop().run_in_executor(
        self._threads,
        self._decoders.decode,
        request.headers['content-type'],
        body,
        model.image_size,
        model.white_level,
        preview,
        keep,
      )
    finally:
      self._held -= len(body)

  async def _read(
    self, request: requests.Request, body: bytearray, limit: int = 0
  ) -> None:
    """Reads into a body; one above the limit (0: any) is read and dropped.

    It is dropped up to twice the size of the largest image, beyond which the
    connection is closed under the client. The caller takes its length off
    `_held`.
    """
    total, full = 0, False
    try:
      async with asyncio.timeout(self.limits.seconds):
        async for chunk in request.stream():
          total += len(chunk)
          if total > 2 * self.limits.bytes + _OVERHEAD:
            break
          full = full or self._held + len(chunk) > self.limits.held
          if total <= limit and not full:
            body += chunk
            self._held += len(chunk)
    except TimeoutError:
      raise fastapi.HTTPException(
        408,
        f'the body took more than {self.limits.seconds:g} s',
        {'Connection': 'close'},
      ) from None
    except requests.ClientDisconnect:
      raise fastapi.HTTPException(400, 'the body ended early') from None
    if limit and total > limit:
      raise fastapi.HTTPException(
        413, f'an image may have {self.limits.bytes} bytes at most'
      )
    if limit and full:
      raise _too_many(f'requests of {self.limits.held} bytes are waiting')


def _kind(request: requests.Request) -> str:
  """The content type without its parameters."""
  header = request.headers.get('content-type', '')
  return header.partition(';')[0].strip().lower()


def _too_many(reason: str) -> fastapi.HTTPException:
  return fastapi.HTTPException(
    503, f'{reason}; try again', {'Retry-After': '1'}
  )
