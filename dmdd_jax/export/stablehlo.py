"""Writes a StableHLO archive, which `dmdd_jax.exported` runs.

Synopsis:

  stablehlo.write(program, 'screw.dmdd')
"""

import json

import jax
from jax import export as jax_export
import numpy as np

from dmdd_jax.export import loader
from dmdd_jax.export import program as program_lib

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write(program: program_lib.Program, path: str) -> None:
  """Writes function, weights and metadata as one archive of numpy arrays."""
  (batch,) = jax_export.symbolic_shape('batch')
  weights = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.weights
  )
  shape = (batch, *program.metadata['input']['shape'][1:])
  function = jax_export.export(jax.jit(program.function), platforms=PLATFORMS)(
    weights, jax.ShapeDtypeStruct(shape, np.uint8)
  )
  serialized = bytes(function.serialize())
  metadata = {
    'format': loader.FORMATS[-1],
    'program_sha256': loader.program_digest(serialized, program.weights),
    'platforms': list(PLATFORMS),
    'calling_convention': function.calling_convention_version,
    **program.metadata,
  }
  document = json.dumps(metadata, allow_nan=False).encode()
  with open(path, 'wb') as file:  # numpy would append .npz to a name.
    np.savez(
      file,
      **{
        loader.METADATA: np.frombuffer(document, np.uint8),
        loader.FUNCTION: np.frombuffer(serialized, np.uint8),
      },
      **program.weights,
    )
