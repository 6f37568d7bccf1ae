"""Runs a file of `tools/export.py --format stablehlo`: jax and numpy alone.

Synopsis:

  model = exported.load('screw.dmdd')
  scores, maps = model(images)    # uint8 (N, S, S, 3), RGB

The public name of export/loader.py, which has the code.
"""

from dmdd_jax.export.loader import ExportedFileError
from dmdd_jax.export.loader import load
from dmdd_jax.export.loader import Model

__all__ = ('ExportedFileError', 'Model', 'load')
