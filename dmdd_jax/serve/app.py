"""An HTTP server and a live page over trained models.

Concurrent requests are answered together: while the device works, what
arrives waits, and all of it (up to a batch) is the next call (batching.py).
A request passes security.py, service.py, decoding.py and batching.py.

Synopsis:

  paths = ['runs/mvtec/screw', 'nut.onnx']
  models = [serve_models.open_model(path) for path in paths]
  serve.run(serve.create_app(models), port=8000)
"""

from collections.abc import Sequence
import contextlib
import os
import resource
import threading
from typing import Annotated, Any

from absl import logging
import fastapi
from fastapi import responses
import prometheus_client
import uvicorn

from dmdd_jax.serve import feedback as feedback_lib
from dmdd_jax.serve import journal as journal_lib
from dmdd_jax.serve import limits as limits_lib
from dmdd_jax.serve import models as serve_models
from dmdd_jax.serve import schema
from dmdd_jax.serve import security
from dmdd_jax.serve import service as service_lib

# The files of the page: where they lie, and their types.
_FOLDER = os.path.dirname(__file__)
_PAGE = {
  'page.html': 'text/html; charset=utf-8',
  'page.css': 'text/css; charset=utf-8',
  'camera.js': 'text/javascript; charset=utf-8',
  'page.js': 'text/javascript; charset=utf-8',
  'paint.js': 'text/javascript; charset=utf-8',
}
_PAGE_POLICY = (
  "default-src 'none'; img-src data: blob:; style-src 'self';"
  " script-src 'self'; connect-src 'self'; base-uri 'none';"
  " form-action 'none'; frame-ancestors 'none'"
)
# Seconds that running requests get after SIGTERM, and the cleaning up after it.
_GRACE, _CLEAN_UP = 30, 2


def create_app(
  models: Sequence[serve_models.Model],
  limits: limits_lib.Limits | None = None,
  token: str = '',
  hosts: security.Hosts | None = None,
  journal: journal_lib.Journal | None = None,
  keep: feedback_lib.Keep | None = None,
) -> fastapi.FastAPI:
  """Builds the application.

  Args:
    models: of different categories; at least one.
    limits: of requests.
    token: if not empty, /v1 asks for it as a bearer token.
    hosts: names under which it may be asked; any by default.
    journal: gets an entry for each inspection and each refusal.
    keep: gets what operators say of verdicts; by default, nobody is asked.

  Raises:
    ValueError: no model, or two of one category; a token that no header can
      carry.
  """
  names = [model.category for model in models]
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f'serve models of different categories, at least one, got {names}'
    )
  service = service_lib.Service(
    models, limits or limits_lib.Limits(), token, keep
  )
  app = fastapi.FastAPI(
    title='dmdd_jax',
    description='Finds and outlines defects in images.',
    lifespan=service.lifespan,
    docs_url=None,  # Its page loads scripts from elsewhere.
    redoc_url=None,
    redirect_slashes=False,  # Its address would be the client's Host header.
  )
  app.add_middleware(
    security.Guard,
    hosts=hosts or security.Hosts(),
    metrics=service.metrics,
    journal=journal or journal_lib.open_journal(None),
  )
  _add_plain_routes(app, service)
  _add_inspection(app, service)
  return app


def _add_plain_routes(
  app: fastapi.FastAPI, service: service_lib.Service
) -> None:
  """The page, health and metrics."""

  def add_file(name: str, path: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page() -> responses.Response:
      return responses.FileResponse(
        os.path.join(_FOLDER, name),
        media_type=_PAGE[name],
        headers={
          'Content-Security-Policy': _PAGE_POLICY,
          'Cache-Control': 'no-cache',  # Its files fit one another.
        },
      )

  for name in _PAGE:
    add_file(name, '/' if name == 'page.html' else f'/{name}')

  @app.get(
    '/healthz',
    responses={
      503: {'model': schema.Fault, 'description': 'a model has stopped'}
    },
  )
  async def healthz() -> schema.Health:
    """Answers while the server works."""
    if not service.works:
      raise fastapi.HTTPException(
        503, 'a model is served no longer; see the log and start again'
      )
    return schema.Health(status='ok', waiting=service.waiting)

  @app.get('/metrics', response_class=responses.PlainTextResponse)
  async def metrics() -> Any:
    """Counters for Prometheus."""
    return responses.PlainTextResponse(
      prometheus_client.generate_latest(service.metrics.registry),
      media_type=prometheus_client.CONTENT_TYPE_LATEST,
    )


def _add_inspection(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """What the token guards."""

  @app.get(
    '/v1/models', responses={code: schema.FAULTS[code] for code in (401, 403)}
  )
  async def models(request: fastapi.Request) -> list[schema.ModelInfo]:
    """The categories that are served."""
    security.authorize(request.headers, service.token)
    return [
      schema.ModelInfo(
        category=model.category,
        image_size=model.image_size,
        image_threshold=model.image_threshold,
        pixel_threshold=model.pixel_threshold,
        feedback=service.keep is not None,
      )
      for model in (x.model for x in service.batchers.values())
    ]

  @app.post(
    '/v1/inspect',
    responses=schema.FAULTS,
    openapi_extra={'requestBody': schema.BODY},
  )
  async def inspect(
    request: fastapi.Request,
    query: Annotated[schema.InspectQuery, fastapi.Query()],
  ) -> schema.Inspection:
    """Inspects one image: verdict, score and map."""
    return await service.inspect(request, query)

  @app.post(
    '/v1/feedback',
    responses=schema.FAULTS,
    openapi_extra={'requestBody': schema.BODY},
  )
  async def feedback(
    request: fastapi.Request,
    query: Annotated[schema.FeedbackQuery, fastapi.Query()],
  ) -> schema.Feedback:
    """Keeps an image whose verdict is wrong, with what it is."""
    return await service.take_feedback(request, query)


class _Server(uvicorn.Server):
  """Ends the process when the grace period is over, whatever still runs."""

  def handle_exit(self, sig: int, frame: Any) -> None:
    """Starts to stop, at a signal."""
    if not self.should_exit:
      grace = self.config.timeout_graceful_shutdown
      timer = threading.Timer(grace + _CLEAN_UP, _leave)
      timer.daemon = True
      timer.start()
    super().handle_exit(sig, frame)


def _leave() -> None:
  # A thread within a model cannot be ended in another way.
  logging.error('what still ran when the time to stop was over is left undone')
  logging.flush()
  os._exit(1)


def run(
  app: fastapi.FastAPI,
  host: str = '127.0.0.1',
  port: int = 8000,
  grace: int = _GRACE,
) -> None:
  """Serves until SIGINT or SIGTERM, then answers what waits and returns.

  If that takes longer than `grace` seconds, the process ends with status 1.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:  # A connection is a file; 1024 of them are too few.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  config = uvicorn.Config(
    app,
    host=host,
    port=port,
    log_level='warning',
    timeout_keep_alive=30,
    timeout_graceful_shutdown=grace,
    server_header=False,
  )
  with contextlib.suppress(KeyboardInterrupt):  # Raised again when all is done.
    _Server(config).run()
