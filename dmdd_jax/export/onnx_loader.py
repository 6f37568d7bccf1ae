"""Runs a file of `tools/export.py --format onnx`: onnxruntime and numpy alone.

Synopsis:

  model = onnx_loader.load('screw.onnx')
  scores, maps = model(images)    # uint8 (N, S, S, 3), RGB
"""

import json
import os
from typing import Any

import numpy as np


class OnnxFileError(ValueError):
  """A file is missing, damaged, no exported model, or cannot be run here."""


class Model:
  """An exported model in onnxruntime on the CPU.

  Attributes:
    metadata: category, input and thresholds.
  """

  def __init__(self, session: Any):
    self._session = session
    names = {x.name for x in session.get_inputs() + session.get_outputs()}
    if missing := {'images', 'score', 'map'} - names:
      raise KeyError(*sorted(missing))
    properties = session.get_modelmeta().custom_metadata_map
    self.metadata = {'category': properties['category']}
    for name in ('input', 'image_threshold', 'pixel_threshold'):
      self.metadata[name] = json.loads(properties[name])
    self.image_size = self.metadata['input']['shape'][1]

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and maps (N, S, S) of uint8 images (N, S, S, 3), RGB."""
    scores, maps = self._session.run(['score', 'map'], {'images': images})
    return scores, maps


def load(path: str | os.PathLike) -> Model:
  """Opens a file of `tools/export.py --format onnx`.

  Raises:
    OnnxFileError: it is no such file, or onnxruntime is missing.
  """
  try:
    import onnxruntime  # Of an extra.
  except ModuleNotFoundError as error:
    raise OnnxFileError(
      f"{os.fspath(path)} needs the extra: pip install -e '.[onnx]'"
    ) from error
  try:
    return Model(
      onnxruntime.InferenceSession(
        os.fspath(path), providers=['CPUExecutionProvider']
      )
    )
  except Exception as error:  # onnxruntime's have no other class in common.
    raise OnnxFileError(
      f'{os.fspath(path)} is no exported model that can be read ({error!r});'
      ' write it with tools/export.py --format onnx'
    ) from error


def processors() -> int:
  """How many processors this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
