"""Decodes the bodies of requests in child processes (worker.py).

A file can be made to take minutes or gigabytes to decode. A child ends itself
when its time is over, and may not use more memory than it is given; the next
job gets another child.

Synopsis:

  decoders = decoding.Decoders(2, limits)
  image = decoders.decode('application/json', body, side=256)
  decoders.close()
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
from typing import Any

from absl import logging
import numpy as np

from dmdd_jax.serve import limits as limits_lib
from dmdd_jax.serve import worker


@dataclasses.dataclass(frozen=True)
class Decoded:
  """An image as the model takes it.

  Attributes:
    pixels: uint8 (S, S, 3) RGB.
    height: of the file, upright.
    width: likewise.
    sha256: of the file.
    preview: it as JPEG, no larger than a screen; empty unless asked for.
    content: the file; empty unless asked for.
  """

  pixels: np.ndarray
  height: int
  width: int
  sha256: str
  preview: bytes
  content: bytes


class Decoders:
  """Child processes that decode, one body at a time each."""

  def __init__(self, count: int, limits: limits_lib.Limits):
    self._limits = limits
    self._closed = False
    self._children = [self._start() for _ in range(count)]
    self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(count):
      self._idle.put(index)

  def decode(
    self,
    content_type: str,
    body: Any,
    side: int,
    white_level: int = 0,
    preview: bool = False,
    keep: bool = False,
  ) -> Decoded:
    """Waits for a child and its answer; can be called from any thread.

    Args:
      content_type: multipart/form-data with its boundary, or application/json.
      body: bytes of the request.
      side: of the image that is returned.
      white_level: see `images.read_image`.
      preview: whether to make one.
      keep: whether the file itself is returned, too.

    Raises:
      worker.Refusal: the body holds no image, or one beyond the limits.
    """
    index = self._idle.get()
    try:
      child = self._children[index]
      job = {
        'content_type': content_type,
        'side': side,
        'white_level': white_level,
        'preview': preview,
        'keep': keep,
      }
      try:
        worker.write_frame(child.stdin, job, body)
        answer, pixels = worker.read_frame(child.stdout)
      except (OSError, EOFError):
        raise self._replace(index) from None
    finally:
      self._idle.put(index)
    if answer['status'] != 200:
      raise worker.Refusal(answer['status'], answer['detail'])
    size = side * side * 3
    end = size + answer['preview']
    return Decoded(
      np.frombuffer(pixels, np.uint8, size).reshape(side, side, 3),
      answer['height'],
      answer['width'],
      answer['sha256'],
      pixels[size:end],
      pixels[end:],
    )

  def close(self) -> None:
    """Ends the children; what they decode is refused."""
    self._closed = True
    for child in self._children:
      child.kill()

  def _start(self) -> subprocess.Popen:
    limits = {
      'bytes': self._limits.bytes,
      'pixels': self._limits.pixels,
      'memory': self._limits.decode_memory,
      'seconds': self._limits.decode_seconds,
    }
    return subprocess.Popen(
      [sys.executable, '-m', worker.__name__, json.dumps(limits)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      # Decoders in C write there what a file says.
      stderr=subprocess.DEVNULL,
      env={
        **os.environ,
        'PYTHONPATH': os.pathsep.join(filter(None, sys.path)),
        # Each thread of a library reserves memory, and none is used.
        'OPENBLAS_NUM_THREADS': '1',
      },
    )

  def _replace(self, index: int) -> worker.Refusal:
    """Starts another child in the place of one that ended; says why it did."""
    child = self._children[index]
    child.kill()
    status = child.wait()
    for stream in (child.stdin, child.stdout):
      with contextlib.suppress(OSError):  # Of what was not sent.
        stream.close()
    if self._closed:
      return worker.Refusal(503, 'the server is stopping')
    self._children[index] = self._start()
    if status == -signal.SIGALRM:
      seconds = self._limits.decode_seconds
      return worker.Refusal(413, f'decoding took more than {seconds:g} s')
    logging.error('a decoding process has ended with the status %d', status)
    return worker.Refusal(415, 'the image ended the process that decodes it')
