"""An HTTP server and a live page over trained models.

Concurrent requests are answered together: while the device works, what
arrives waits, and all of it (up to a batch) is the next call (batching.py).

Synopsis:

  paths = ['runs/mvtec/screw', 'nut.onnx']
  models = [serve_models.open_model(path) for path in paths]
  serve.run(serve.create_app(models), port=8000)
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable, Sequence
import concurrent.futures
import contextlib
import dataclasses
import hmac
import io
import json
import os
import resource
import time
from typing import Annotated, Any, Literal
import urllib.parse

import fastapi
from fastapi import responses
import numpy as np
from PIL import Image
import prometheus_client
import pydantic
from starlette import datastructures
from starlette import formparsers
from starlette import requests
import uvicorn

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.serve import batching
from dmdd_jax.serve import models as serve_models

PAGE = os.path.join(os.path.dirname(__file__), 'page.html')
_DECODERS = 4  # Each may hold an image of `Limits.pixels`.
# Headers and, for JSON, quotes around what an image takes.
_OVERHEAD = 2**16


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for.

  Attributes:
    bytes: of an image file.
    pixels: of an image; checked before it is decoded.
    waiting: requests being read, decoded or waiting for the device; one more
      gets 503.
    seconds: a body may take to arrive.
  """

  bytes: int = 16 * 2**20
  pixels: int = 50_000_000
  waiting: int = 128
  seconds: float = 30.0


class ModelInfo(pydantic.BaseModel):
  """A category that is served."""

  category: str
  image_size: int
  image_threshold: float | None
  pixel_threshold: float | None


class Health(pydantic.BaseModel):
  """The server's state."""

  status: Literal['ok']
  waiting: int


class AnomalyMap(pydantic.BaseModel):
  """A map of the model's size; `data` is base64.

  png: 8-bit grey, 0 is `low` and 255 is `high`; float32: little-endian rows.
  """

  format: Literal['png', 'float32']
  size: int
  low: float
  high: float
  data: str


class Inspection(pydantic.BaseModel):
  """What is said of an image."""

  category: str
  score: float
  verdict: Literal['defective', 'good', 'uncalibrated']
  image_threshold: float | None
  pixel_threshold: float | None
  height: int
  width: int
  map: AnomalyMap | None


class Fault(pydantic.BaseModel):
  """Why a request was refused."""

  detail: str


class Metrics:
  """What /metrics shows; a registry per application."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      'dmdd_requests', 'Answers by status.', ['status'], registry=self.registry
    )
    self.verdicts = prometheus_client.Counter(
      'dmdd_verdicts',
      'Inspected images.',
      ['category', 'verdict'],
      registry=self.registry,
    )
    self.seconds = prometheus_client.Histogram(
      'dmdd_request_seconds',
      'From the request to its answer, refused ones too.',
      registry=self.registry,
    )
    self.batches = prometheus_client.Histogram(
      'dmdd_batch_images',
      'Images per call of the device.',
      buckets=(1, 2, 4, 8, 16, 32, 64),
      registry=self.registry,
    )
    prometheus_client.ProcessCollector(registry=self.registry)
    self.waiting = prometheus_client.Gauge(
      'dmdd_waiting_requests', 'Not answered yet.', registry=self.registry
    )


class Service:
  """The state behind the routes of an application."""

  def __init__(
    self, models: Sequence[serve_models.Model], limits: Limits, token: str
  ):
    self.limits, self.token, self.metrics = limits, token, Metrics()
    self.waiting = 0
    # The device works on one batch at a time; decoding runs beside it.
    self._device = concurrent.futures.ThreadPoolExecutor(1)
    self._decoders = concurrent.futures.ThreadPoolExecutor(
      min(_DECODERS, os.cpu_count() or 1)
    )
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
    return not any(worker.done() for worker in self._workers)

  @contextlib.asynccontextmanager
  async def lifespan(self, app: fastapi.FastAPI) -> AsyncIterator[None]:
    """Works while the application runs."""
    del app
    self._workers = [
      asyncio.create_task(x.work()) for x in self.batchers.values()
    ]
    try:
      yield
    finally:
      for worker in self._workers:
        worker.cancel()
      self._device.shutdown()
      self._decoders.shutdown()

  def authorize(self, request: requests.Request) -> None:
    """Refuses a request without the token, if there is one."""
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    if self.token and not (
      scheme.lower() == 'bearer'
      # Headers arrive as bytes, which Starlette reads as Latin-1.
      and hmac.compare_digest(given.encode('latin-1'), self.token.encode())
    ):
      raise fastapi.HTTPException(
        401,
        'send the header "Authorization: Bearer TOKEN"',
        {'WWW-Authenticate': 'Bearer'},
      )

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
    self, request: requests.Request, category: str | None, map_format: str
  ) -> Inspection:
    """Reads, decodes, waits for the device, answers."""
    try:
      batcher, in_json = self._admit(request, category)
    except fastapi.HTTPException:
      # Read and dropped, so that the client gets to read the answer.
      await self._body(request, 0)
      raise
    self.waiting += 1
    self.metrics.waiting.set(self.waiting)
    try:
      content = await self._content(request, in_json)
      loop = asyncio.get_running_loop()
      prepared, size = await loop.run_in_executor(
        self._decoders, self._prepare, content, batcher.model.image_size
      )
      score, values = await batcher.inspect(prepared)
    except serve_models.ModelError as error:
      raise fastapi.HTTPException(500, str(error)) from error
    finally:
      self.waiting -= 1
      self.metrics.waiting.set(self.waiting)
    model, verdict = batcher.model, batcher.model.verdict(score)
    self.metrics.verdicts.labels(model.category, verdict).inc()
    return Inspection(
      category=model.category,
      score=score,
      verdict=verdict,
      image_threshold=model.image_threshold,
      pixel_threshold=model.pixel_threshold,
      height=size[0],
      width=size[1],
      map=encode_map(values, map_format),
    )

  def _prepare(
    self, content: bytes, side: int
  ) -> tuple[np.ndarray, tuple[int, int]]:
    """The image at the model's size, and its own (height, width)."""
    try:
      image = images_lib.decode_image(content, self.limits.pixels)
    except images_lib.ImageTooLargeError as error:
      raise fastapi.HTTPException(413, str(error)) from error
    except files.BadImageError as error:
      raise fastapi.HTTPException(415, str(error)) from error
    return images_lib.resize_image(image, side), image.shape[:2]

  def _admit(
    self, request: requests.Request, category: str | None
  ) -> tuple[batching.Batcher, bool]:
    """What can be refused by the headers; whether the body is JSON."""
    self.authorize(request)
    if self.waiting >= self.limits.waiting:
      raise fastapi.HTTPException(
        503,
        f'{self.limits.waiting} requests are waiting; try again',
        {'Retry-After': '1'},
      )
    kind = request.headers.get('content-type', '').partition(';')[0].strip()
    if kind.lower() not in ('multipart/form-data', 'application/json'):
      raise fastapi.HTTPException(
        415,
        f'Content-Type is {kind!r}; send multipart/form-data or'
        ' application/json',
      )
    return self.batcher(category), kind.lower() == 'application/json'

  async def _content(self, request: requests.Request, in_json: bool) -> bytes:
    """The image file of a multipart or JSON body."""
    scale = 4 / 3 if in_json else 1.0  # Base64.
    body = await self._body(request, int(self.limits.bytes * scale) + _OVERHEAD)
    if in_json:
      content = await asyncio.get_running_loop().run_in_executor(
        self._decoders, _from_json, body
      )
    else:
      content = await _from_form(request.headers, body)
    if len(content) > self.limits.bytes:
      raise fastapi.HTTPException(413, self._too_long())
    return content

  async def _body(self, request: requests.Request, limit: int) -> bytes:
    """Reads a body; one above the limit (0: any) is read and dropped.

    It is dropped up to twice the size of the largest image, beyond which the
    connection is closed under the client.
    """
    kept, total = bytearray(), 0
    try:
      async with asyncio.timeout(self.limits.seconds):
        async for chunk in request.stream():
          total += len(chunk)
          if total <= limit:
            kept += chunk
          elif total > 2 * self.limits.bytes + _OVERHEAD:
            break
    except TimeoutError:
      raise fastapi.HTTPException(
        408,
        f'the body took more than {self.limits.seconds:g} s',
        {'Connection': 'close'},
      ) from None
    except requests.ClientDisconnect:
      raise fastapi.HTTPException(400, 'the body ended early') from None
    if limit and total > limit:
      raise fastapi.HTTPException(413, self._too_long())
    return bytes(kept)

  def _too_long(self) -> str:
    return f'an image may have {self.limits.bytes} bytes at most'


def _from_json(body: bytes) -> bytes:
  """The decoded field `image`."""
  try:
    document = json.loads(body)
  except (ValueError, RecursionError):
    raise fastapi.HTTPException(400, 'the body is no JSON') from None
  image = document.get('image') if isinstance(document, dict) else None
  if not isinstance(image, str):
    raise fastapi.HTTPException(
      400, 'the body must be {"image": "BASE64 OF AN IMAGE FILE"}'
    )
  try:
    return base64.b64decode(image, validate=True)
  except (binascii.Error, ValueError):
    raise fastapi.HTTPException(400, '"image" is not base64') from None


async def _from_form(headers: datastructures.Headers, body: bytes) -> bytes:
  """The file in the part `image`."""

  async def stream() -> AsyncIterator[bytes]:
    yield body

  try:
    parser = formparsers.MultiPartParser(
      headers, stream(), max_files=1, max_fields=8
    )
    form = await parser.parse()
  except (formparsers.MultiPartException, KeyError, ValueError) as error:
    raise fastapi.HTTPException(
      400, f'the form cannot be read: {error}'
    ) from None
  try:
    image = form.get('image')
    if not isinstance(image, datastructures.UploadFile):
      raise fastapi.HTTPException(400, 'the form has no file named "image"')
    return await image.read()
  finally:
    await form.close()


def encode_map(values: np.ndarray, map_format: str) -> AnomalyMap | None:
  """A map (S, S) for a response, see `AnomalyMap`; None for 'none'."""
  if map_format == 'none':
    return None
  low, high = float(values.min()), float(values.max())
  if map_format == 'float32':
    data = np.ascontiguousarray(values, '<f4').tobytes()
  else:
    shades = (values - low) / max(high - low, 1e-12)
    file = io.BytesIO()
    picture = Image.fromarray(np.round(shades * 255).astype(np.uint8))
    picture.save(file, 'PNG', compress_level=1)
    data = file.getvalue()
  return AnomalyMap(
    format=map_format,
    size=len(values),
    low=low,
    high=high,
    data=base64.b64encode(data).decode(),
  )


_FAULTS = {
  400: 'no image in the body',
  401: 'the token is missing or wrong',
  404: 'no such category',
  408: 'the body did not arrive in time',
  413: 'too many bytes or pixels',
  415: 'no image of a known format',
  500: 'the model failed',
  503: 'too many requests are waiting',
}
_BODY = {
  'required': True,
  'content': {
    'multipart/form-data': {
      'schema': {
        'type': 'object',
        'required': ['image'],
        'properties': {'image': {'type': 'string', 'format': 'binary'}},
      }
    },
    'application/json': {
      'schema': {
        'type': 'object',
        'required': ['image'],
        'properties': {
          'image': {
            'type': 'string',
            'format': 'byte',
            'description': 'An image file in base64.',
          }
        },
      }
    },
  },
}


def create_app(
  models: Sequence[serve_models.Model],
  limits: Limits | None = None,
  token: str = '',
  hosts: Sequence[str] = (),
) -> fastapi.FastAPI:
  """Builds the application.

  Args:
    models: of different categories; at least one.
    limits: of requests.
    token: if not empty, /v1 asks for it as a bearer token.
    hosts: names under which it may be asked, so that no other web site's name
      can be pointed at this machine; any if empty.

  Raises:
    ValueError: no model, or two of one category.
  """
  names = [model.category for model in models]
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f'serve models of different categories, at least one, got {names}'
    )
  service = Service(models, limits or Limits(), token)
  app = fastapi.FastAPI(
    title='dmdd_jax',
    description='Finds and outlines defects in images.',
    lifespan=service.lifespan,
    docs_url=None,  # Its page loads scripts from elsewhere.
    redoc_url=None,
    redirect_slashes=False,  # Its address would be the client's Host header.
  )
  _add_middleware(app, service, hosts)
  _add_plain_routes(app, service)
  _add_inspection(app, service)
  return app


def _add_middleware(
  app: fastapi.FastAPI, service: Service, hosts: Sequence[str]
) -> None:
  """Counts every answer, and refuses requests for another host."""
  names = {name.lower() for name in hosts}

  @app.middleware('http')
  async def count(request: requests.Request, following: Callable) -> Any:
    started, status = time.perf_counter(), 500
    try:
      host = _host_name(request.headers.get('host', ''))
      if names and host not in names:
        response: Any = responses.JSONResponse(
          {'detail': f'the host {host!r} is not served; see --allowed_host'},
          400,
        )
      else:
        response = await following(request)
      status = response.status_code
      return response
    finally:
      service.metrics.requests.labels(str(status)).inc()
      service.metrics.seconds.observe(time.perf_counter() - started)


def _host_name(header: str) -> str:
  """The name in a Host header, without the port; empty if it is none."""
  try:
    return urllib.parse.urlsplit(f'//{header}').hostname or ''
  except ValueError:
    return ''


def _add_plain_routes(app: fastapi.FastAPI, service: Service) -> None:
  """The page, health and metrics."""

  @app.get('/', include_in_schema=False)
  async def page() -> responses.Response:
    return responses.FileResponse(
      PAGE,
      media_type='text/html; charset=utf-8',
      headers={
        'Content-Security-Policy': "default-src 'none'; img-src data: blob:;"
        " style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src"
        " 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        'X-Content-Type-Options': 'nosniff',
      },
    )

  @app.get(
    '/healthz',
    responses={503: {'model': Fault, 'description': 'a model has stopped'}},
  )
  async def healthz() -> Health:
    """Answers while the server works."""
    if not service.works:
      raise fastapi.HTTPException(
        503, 'a model is served no longer; see the log and start again'
      )
    return Health(status='ok', waiting=service.waiting)

  @app.get('/metrics', response_class=responses.PlainTextResponse)
  async def metrics() -> Any:
    """Counters for Prometheus."""
    return responses.PlainTextResponse(
      prometheus_client.generate_latest(service.metrics.registry),
      media_type=prometheus_client.CONTENT_TYPE_LATEST,
    )


def _add_inspection(app: fastapi.FastAPI, service: Service) -> None:
  """What the token guards."""
  faults = {
    code: {'model': Fault, 'description': text}
    for code, text in _FAULTS.items()
  }

  @app.get('/v1/models', responses={401: faults[401]})
  async def models(request: fastapi.Request) -> list[ModelInfo]:
    """The categories that are served."""
    service.authorize(request)
    return [
      ModelInfo(
        category=model.category,
        image_size=model.image_size,
        image_threshold=model.image_threshold,
        pixel_threshold=model.pixel_threshold,
      )
      for model in (x.model for x in service.batchers.values())
    ]

  @app.post(
    '/v1/inspect',
    responses=faults,
    openapi_extra={'requestBody': _BODY},
  )
  async def inspect(
    request: fastapi.Request,
    category: Annotated[
      str | None, fastapi.Query(description='Needed if several are served.')
    ] = None,
    map: Annotated[  # The name in the address.
      Literal['png', 'float32', 'none'],
      fastapi.Query(description='How the map is sent.'),
    ] = 'png',
  ) -> Inspection:
    """Inspects one image: verdict, score and map."""
    return await service.inspect(request, category, map)


def run(
  app: fastapi.FastAPI, host: str = '127.0.0.1', port: int = 8000
) -> None:
  """Serves until SIGINT or SIGTERM, then answers what waits and returns."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:  # A connection is a file; 1024 of them are too few.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  config = uvicorn.Config(
    app,
    host=host,
    port=port,
    log_level='warning',
    timeout_keep_alive=30,
    timeout_graceful_shutdown=30,
    server_header=False,
  )
  with contextlib.suppress(KeyboardInterrupt):  # Raised again when all is done.
    uvicorn.Server(config).run()
