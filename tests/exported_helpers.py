"""Exported files of a function that takes no time to translate."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmdd_jax.export import program as program_lib
from dmdd_jax.export import stablehlo
from dmdd_jax.export import write as export_lib

SIDE = 8


def make_program(**metadata):
  """The map is the image's brightness times a weight, the score its maximum."""

  def function(weights, images):
    maps = images.astype(jnp.float32).mean(-1) * weights['gain']
    return {'score': maps.max(axis=(1, 2)), 'map': maps}

  return program_lib.Program(
    function,
    {'gain': np.float32([1 / 255])},
    {
      'category': 'nut',
      'dtype': 'float32',
      'input': {'shape': ['batch', SIDE, SIDE, 3]},
      'image_threshold': 0.5,
      'pixel_threshold': 0.5,
      'verified': {'images': 1},
      **metadata,
    },
  )


def write(kind, folder, **metadata):
  """The path of a file of one of the two formats."""
  path = folder / ('model.onnx' if kind == 'onnx' else 'model.dmdd')
  if kind == 'onnx':
    pytest.importorskip('onnx', reason='the extra onnx is not installed')
    pytest.importorskip('onnxruntime', reason='the extra onnx is missing')
    export_lib.write_onnx(make_program(**metadata), str(path))
  else:
    stablehlo.write(make_program(**metadata), str(path))
  return path
