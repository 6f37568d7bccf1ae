"""Latency and rate of one model through every path that inspects images.

The jitted step, the StableHLO file, the ONNX file in onnxruntime and a server
over HTTP, in one run: milliseconds of one image alone, and images a second at
each path's best batch, or number of clients. Pixels go in and scores and maps
come out as numpy arrays. The weights are random, which changes no time.

Synopsis:

  figures = latency.run(options)
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import numpy as np
from PIL import Image

from dmdd_jax import predict
from dmdd_jax.benchmark import common
from dmdd_jax.benchmark import measure
from dmdd_jax.data import surfaces
from dmdd_jax.export import loader
from dmdd_jax.export import onnx_loader
from dmdd_jax.export import program as program_lib
from dmdd_jax.export import stablehlo
from dmdd_jax.export import write as export_lib
from dmdd_jax.models import dmdd
from dmdd_jax.scoring import calibration
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.serve import models as serve_models
from dmdd_jax.training import train_state

BATCHES = (1, 4, 16)
LARGE_BATCHES = (64, 128)  # Which a processor does not need.
_CALLS = 40  # Of one image, a repeat: a 99th percentile needs many.


@dataclasses.dataclass(frozen=True)
class Measured:
  """One path: seconds of one image alone, and the best batch's."""

  p50: float
  p99: float
  batch: int
  seconds: measure.Seconds


def run(options: measure.Options) -> list[measure.Figure]:
  """Measures every path whose extra is installed; the others are named."""
  inspector, state = _model(options.size)
  trained = export_lib.describe(inspector, state, teacher_fingerprint='')
  images = [surfaces.surface(str(i), options.size)[0] for i in range(16)]
  images = np.stack(images * (max(_batches()) // 16))
  step, flops = _jitted(trained, images[:1])
  teacher = _teacher(inspector.config, state)
  floor = measure_path(teacher, images, options.repeats)
  jit = measure_path(step, images, options.repeats)
  limit = measure.matmul_peak() / flops
  figures = _figures('jit', jit, floor, 'the teacher alone', limit)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'model.dmdd')
    stablehlo.write(trained, path)
    measured = measure_path(loader.load(path), images, options.repeats)
    figures += _figures('StableHLO', measured, jit, 'jit', limit)
    if _installed('onnx', 'onnxruntime'):
      path = os.path.join(folder, 'model.onnx')
      export_lib.write_onnx(trained, path)
      measured = measure_path(onnx_loader.load(path), images, options.repeats)
      figures += _figures('onnxruntime', measured, jit, 'jit', limit)
    else:
      figures.append(missing('onnxruntime', 'onnx'))
    if _installed(
      'fastapi', 'uvicorn', 'prometheus_client', 'python_multipart'
    ):
      path = os.path.join(folder, 'image.png')
      Image.fromarray(images[0]).save(path)
      model = serve_models.from_inspector(inspector, 'benchmark')
      measured = measure_server(model, path, options.repeats)
      figures += _figures(
        'server', measured, jit, 'jit', limit, 'number of clients'
      )
    else:
      figures.append(missing('server', 'serve'))
  return figures


def _batches() -> tuple[int, ...]:
  return BATCHES + (LARGE_BATCHES if jax.default_backend() != 'cpu' else ())


def _installed(*packages: str) -> bool:
  return all(importlib.util.find_spec(package) for package in packages)


def missing(path: str, extra: str) -> measure.Figure:
  """The row of a path whose extra is not installed."""
  return measure.Figure(
    f'{path}: the extra {extra} is not installed', '', float('nan')
  )


def _model(size: int) -> tuple[predict.Inspector, train_state.TrainState]:
  """A model that nobody trained."""
  config = common.bench_config(size)
  state = train_state.create(
    config, dmdd.from_config(config), jax.random.key(0)
  )
  calibrated = calibration.Calibration(score_lib.Fusion(), 0.5, 0.5, 1.0, 4)
  return predict.Inspector(config, state, calibrated), state


def _jitted(
  trained: program_lib.Program, image: np.ndarray
) -> tuple[Callable[[np.ndarray], Any], float]:
  """The jitted function of images, and its FLOPs for one."""
  weights, whole = jax.device_put(trained.weights), jax.jit(trained.function)
  flops = whole.lower(weights, image).compile().cost_analysis()['flops']
  return lambda rows: jax.device_get(whole(weights, rows)), flops


def _teacher(
  config: Any, state: train_state.TrainState
) -> Callable[[np.ndarray], Any]:
  """The teacher's features, which stay on the device."""
  model = dmdd.from_config(config)
  variables = jax.device_put(dict(train_state.variables(state)))
  teach = jax.jit(lambda v, x: model.apply(v, x / 255.0, method='teach'))
  return lambda rows: jax.block_until_ready(teach(variables, np.float32(rows)))


def measure_path(
  function: Callable[[np.ndarray], Any], images: np.ndarray, repeats: int
) -> Measured:
  """Calls a function of images (N, S, S, 3) with one and with batches."""
  function(images[:1])  # Compiles.
  seconds = []
  for _ in range(_CALLS * repeats):
    started = time.perf_counter()
    function(images[:1])
    seconds.append(time.perf_counter() - started)
  batches = {
    batch: measure.measure(lambda n=batch: function(images[:n]), repeats)
    for batch in _batches()
  }
  batch = _best(batches)
  p50, p99 = np.quantile(seconds, (0.5, 0.99))
  return Measured(float(p50), float(p99), batch, batches[batch])


def _best(batches: dict[int, measure.Seconds]) -> int:
  return max(batches, key=lambda batch: batch / batches[batch].median)


def _figures(
  name: str,
  measured: Measured,
  baseline: Measured,
  baseline_is: str,
  limit: float,
  batch_is: str = 'batch of',
) -> list[measure.Figure]:
  """The rows of a path; `limit` is of images a second."""
  limit_is = 'its FLOPs at the rate of a matrix product'
  return [
    *(
      measure.Figure(
        f'{name}, one image, {quantile}',
        'ms',
        1e3 * getattr(measured, quantile),
        baseline=1e3 * getattr(baseline, quantile),
        baseline_is=baseline_is,
        limit=1e3 / limit,
        limit_is=limit_is,
      )
      for quantile in ('p50', 'p99')
    ),
    measure.rate(
      f'{name}, best {batch_is} {measured.batch}',
      'images/s',
      measured.batch,
      measured.seconds,
      baseline=baseline.batch / baseline.seconds.median,
      baseline_is=f'{baseline_is}, its best, {baseline.batch}',
      limit=limit,
      limit_is=limit_is,
    ),
  ]


def measure_server(
  model: serve_models.Model, path: str, repeats: int
) -> Measured:
  """A server over a model, asked by another process: a file in, JSON out.

  Args:
    model: what is served.
    path: of the image file.
    repeats: of each number of clients, which stand for batches.
  """
  from dmdd_jax.serve import app as serve_app  # Of an extra.

  app = serve_app.create_app([model])
  with _serving(app) as url:

    def ask(requests: int, clients: int) -> dict[str, Any]:
      command = [
        sys.executable,
        os.path.join(measure.ROOT, 'tools', 'serve_load.py'),
      ]
      command += [
        f'--url={url}/v1/inspect',
        f'--image={path}',
        f'--requests={requests}',
      ]
      done = subprocess.run(
        [*command, f'--clients={clients}'], check=True, stdout=subprocess.PIPE
      )
      report = json.loads(done.stdout)
      if report['answers'] != {'image': {'200': requests}}:  # It is no speed.
        raise RuntimeError(f'not all were inspected: {report["answers"]}')
      return report

    ask(8, 2)
    alone = ask(_CALLS * repeats, 1)
    clients = {}
    for count in _batches():
      # Several rounds, so that batches form; seconds are of one of them.
      rounds = [ask(4 * count, count)['seconds'] / 4 for _ in range(repeats)]
      clients[count] = measure.Seconds(
        float(np.median(rounds)), min(rounds), max(rounds), 0.0
      )
  best = _best(clients)
  return Measured(alone['p50'], alone['p99'], best, clients[best])


@contextlib.contextmanager
def _serving(app: Any) -> Iterator[str]:
  """Runs an application in a thread; gives its address."""
  import uvicorn

  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level='error'))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
    thread.start()
    try:
      while not server.started:
        if not thread.is_alive():
          raise RuntimeError('the server did not start')
        time.sleep(0.01)
      yield f'http://127.0.0.1:{listener.getsockname()[1]}'
    finally:
      server.should_exit = True
      thread.join()
