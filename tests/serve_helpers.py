"""A server in a thread, over a stand-in for a model."""

import base64
import contextlib
import hashlib
import io
import socket
import threading
import time

import numpy as np
from PIL import Image
import pytest

pytest.importorskip('fastapi', reason='the extra serve is not installed')
pytest.importorskip('uvicorn', reason='the extra serve is not installed')
httpx = pytest.importorskip('httpx2', reason='httpx2 is not installed')

from dmdd_jax.serve import app as serve_app  # noqa: E402
from dmdd_jax.serve import models as serve_models  # noqa: E402

SIDE = 16


def make_model(category='nut', seconds=0.0, image_threshold=0.5):
  """The map is the image's brightness in [0, 1], the score its maximum."""

  def run(images):
    time.sleep(seconds)
    if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
      raise AssertionError(images.shape)
    if (images == 13).all():
      raise RuntimeError('thirteen')
    maps = images.mean(-1).astype(np.float32) / np.float32(255)
    scores = maps.max(axis=(1, 2))
    if (images == 14).all():
      scores[:] = np.nan
    if (images == 15).all():
      maps[:, 0, 0] = np.inf
    return (scores[:0] if (images == 16).all() else scores), maps

  return serve_models.Model(
    category, SIDE, 8, image_threshold, 0.5, run, category
  )


@contextlib.contextmanager
def serving(models=None, **options):
  """Runs a server in a thread; gives its address."""
  import uvicorn

  app = serve_app.create_app(models or [make_model()], **options)
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'http://127.0.0.1:{listener.getsockname()[1]}'
    server = uvicorn.Server(uvicorn.Config(app, log_level='error'))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
    thread.start()
    try:
      deadline = time.monotonic() + 120
      while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
      yield address
    finally:
      server.should_exit = True
      thread.join()


def png(level=100, size=(30, 20)):
  """A file: grey, with a spot of level + 100."""
  pixels = np.full((size[1], size[0], 3), level, np.uint8)
  pixels[: size[1] // 2, : size[0] // 2] += np.uint8(100)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def post(address, content, path='/v1/inspect', **options):
  return httpx.post(
    address + path, files={'image': ('x.png', content)}, timeout=120, **options
  )


def base64_of(content):
  return base64.b64encode(content).decode()


def sha256_of(content):
  return hashlib.sha256(content).hexdigest()
