"""From a checkpoint to one file that other programs run.

  stablehlo  jax.export for cpu, cuda and tpu; `exported.load` runs it
  onnx       for onnxruntime and others; needs the extra `onnx`

A file is written only after it was read back and gave the checkpoint's scores
and maps on real images.

Synopsis:

  metadata = export.export('runs/mvtec/screw', 'stablehlo', 'screw.dmdd')
"""

from collections.abc import Callable, Sequence
import contextlib
import os
import shutil
from typing import Any

from absl import logging
from flax import traverse_util
import jax
import ml_collections
import numpy as np

from dmdd_jax import predict
from dmdd_jax import provenance
from dmdd_jax import verdict as verdict_lib
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import tiles
from dmdd_jax.export import loader
from dmdd_jax.export import onnx as onnx_writer
from dmdd_jax.export import onnx_loader
from dmdd_jax.export import program as program_lib
from dmdd_jax.export import stablehlo
from dmdd_jax.models import dmdd
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.scoring import trained as trained_lib
from dmdd_jax.training import train_state

FORMATS = ('stablehlo', 'onnx')
# Of scores and maps: of the checkpoint's value where that is above 1.
TOLERANCE = 1e-4
_IMAGES = 8


def export(
  workdir: str | os.PathLike,
  file_format: str,
  output: str | os.PathLike,
  images: str | None = None,
  step: int | None = None,
) -> dict[str, Any]:
  """Writes a checkpoint as one file, if it equals the checkpoint.

  Args:
    workdir: a trained category's folder.
    file_format: one of `FORMATS`.
    output: the file; its folder is made. Beside an ONNX file its loader is
      written, dmdd_onnx.py.
    images: what to compare on, see `files.list_inputs`, eight of the images at
      most; normal training images if None.
    step: which checkpoint, by default the newest.

  Returns:
    The file's metadata; 'verified' has the measured differences.

  Raises:
    ExportError: scores or maps differ by more than `TOLERANCE`, or the model
      sees tiles.
    CheckpointError, MissingDataError, BadImageError: as elsewhere.
  """
  if file_format not in FORMATS:
    raise ValueError(
      f'--format={file_format!r}: choose one of {", ".join(FORMATS)}'
    )
  config, state, calibration, meta = trained_lib.load_workdir(workdir, step)
  if len(tiles.make_grid(config.data)) > 1:
    raise program_lib.ExportError(
      f'config.data.tile_size is {config.data.tile_size}: a model of tiles'
      f' cannot be exported. Serve the folder itself (tools/serve.py --workdir'
      f' {os.fspath(workdir)}), or train with config.data.tile_size = 0.'
    )
  pictures = [
    images_lib.read_image(path, None, config.data.white_level)
    for path in _comparison_files(config, images)
  ]
  inspector = predict.Inspector(config, state, calibration)
  program = describe(inspector, state, meta['teacher_fingerprint'])
  write, read = {
    'stablehlo': (stablehlo.write, loader.load),
    'onnx': (write_onnx, onnx_loader.load),
  }[file_format]
  output = os.path.abspath(output)
  os.makedirs(os.path.dirname(output), exist_ok=True)
  partial = f'{output}.partial'
  try:
    write(program, partial)
    verified = compare(inspector, read(partial), pictures)
    program.metadata['verified'] = verified
    write(program, partial)
    os.replace(partial, output)
    if file_format == 'onnx':
      copy_loader(output)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
  logging.info('%s equals the checkpoint: %s', output, verified)
  return program.metadata


def compare(
  inspector: predict.Inspector,
  run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
  images: Sequence[np.ndarray],
) -> dict[str, Any]:
  """Scores and maps of a file beside the checkpoint's, in two batch sizes.

  Args:
    inspector: the checkpoint.
    run: what was exported: prepared uint8 images (N, S, S, 3) in, scores (N,)
      and maps (N, S, S) out.
    images: uint8 (H, W, 3), of any sizes; at least one.

  Returns:
    How many images, on which platform, and the largest differences.

  Raises:
    ExportError: a difference is above `TOLERANCE`, or not finite.
  """
  expected = inspector(images)
  side = inspector.config.data.image_size
  rows = np.stack([images_lib.resize_image(image, side) for image in images])
  largest = {'score': 0.0, 'map': 0.0}
  for count in sorted({1, len(images)}):
    scores, maps = run(rows[:count])
    for index, truth in enumerate(expected[:count]):
      anomaly_map = map_files.resize_map(maps[index], truth.map.shape)
      pairs = {
        'score': (scores[index], truth.score),
        'map': (anomaly_map, truth.map),
      }
      for name, (output, reference) in pairs.items():
        difference = float(np.max(np.abs(output - reference)))
        allowed = TOLERANCE * max(1.0, float(np.max(np.abs(reference))))
        if not difference <= allowed:  # NaN is above, too.
          raise program_lib.ExportError(
            f'the {name} of image {index} in a batch of {count} differs from'
            f" the checkpoint's by {difference:.3g}; at most {allowed:.3g} is"
            ' allowed. Nothing was written.'
          )
        largest[name] = max(largest[name], difference)
  return {
    'images': len(images),
    'platform': jax.default_backend(),
    'tolerance': TOLERANCE,
    'largest_score_difference': largest['score'],
    'largest_map_difference': largest['map'],
  }


def describe(
  inspector: predict.Inspector,
  state: train_state.TrainState,
  teacher_fingerprint: str,
) -> program_lib.Program:
  """The function of a checkpoint, its weights and its metadata."""
  config, calibration = inspector.config, inspector.calibration
  function = make_function(config, calibration.fusion)
  variables = jax.tree.map(np.asarray, dict(train_state.variables(state)))
  side = config.data.image_size
  white_level = config.data.white_level
  scaling = '(value + 128) // 257'
  if white_level:
    half = white_level // 2
    scaling = f'(min(value, {white_level}) * 255 + {half}) // {white_level}'
  metadata = {
    'category': config.data.category,
    'step': inspector.step,
    'arch': config.teacher.arch,
    'trunk': config.student.trunk,
    'head': config.head.kind,
    'dtype': config.dtype,
    'input': {
      'name': 'images',
      'layout': 'NHWC',
      'dtype': 'uint8',
      'shape': ['batch', side, side, 3],
      'range': [0, 255],
      'channels': 'RGB',
      'resize': 'Pillow BILINEAR (antialiased), aspect ratio not kept',
      'decoding': 'upright by EXIF; transparent images over black; 16-bit grey'
      f' as {scaling}; palette, grey and CMYK by Pillow to RGB',
    },
    'outputs': {
      'score': 'float32 (batch,), higher is more anomalous',
      'map': f'float32 (batch, {side}, {side}), higher is more anomalous',
    },
    'image_threshold': verdict_lib.threshold_or_none(
      calibration.image_threshold
    ),
    'pixel_threshold': verdict_lib.threshold_or_none(
      calibration.pixel_threshold
    ),
    'calibration_images': calibration.images,
    # Of 16-bit files; whoever prepares the input must scale them by it.
    'white_level': white_level,
    'teacher_fingerprint': teacher_fingerprint,
    'versions': provenance.versions(),
    'git_revision': provenance.git_revision(),
  }
  weights = traverse_util.flatten_dict(variables, sep='/')
  return program_lib.Program(function, weights, metadata)


def make_function(
  config: ml_collections.ConfigDict, fusion: score_lib.Fusion
) -> Callable[..., dict[str, jax.Array]]:
  """`Program.function` of a config: weights are its variables, `/` in names."""
  # Rematerialisation serves gradients alone; the exported program has none.
  plain = config.copy_and_resolve_references()
  with plain.unlocked():
    plain.student.remat = False
  model = dmdd.from_config(plain)

  def function(
    weights: dict[str, jax.Array], images: jax.Array
  ) -> dict[str, jax.Array]:
    prediction = score_lib.predict_step(
      model,
      config.eval,
      traverse_util.unflatten_dict(weights, sep='/'),
      fusion,
      images,
    )
    return {'score': prediction.image_score, 'map': prediction.map}

  return function


def write_onnx(program: program_lib.Program, path: str) -> None:
  """Writes an ONNX model; nested metadata are JSON in its properties."""
  if program.metadata['dtype'] != 'float32':
    raise program_lib.ExportError(
      f'config.dtype is {program.metadata["dtype"]!r}; ONNX is written for'
      ' float32 alone. Use --format=stablehlo.'
    )
  onnx_writer.write(
    path,
    lambda images: program.function(program.weights, images),
    program.metadata['input']['shape'][1:],
    {'format': onnx_loader.FORMATS[-1], **program.metadata},
  )
  seal_onnx(path)


def copy_loader(path: str) -> None:
  """Puts the loader of an ONNX file beside it."""
  beside = os.path.join(os.path.dirname(path), 'dmdd_onnx.py')
  shutil.copyfile(onnx_loader.__file__, beside)


def seal_onnx(path: str) -> None:
  """Adds the property with the checksum that `onnx_loader.load` asks for."""
  with open(path, 'rb') as file:
    digest = onnx_loader.program_digest(file.read())
  # The fields of protobuf may come in any order, and a property is one of them.
  entry = _field(1, b'program_sha256') + _field(2, digest.encode())
  with open(path, 'ab') as file:
    file.write(_field(14, entry))


def _field(number: int, content: bytes) -> bytes:
  """A field of protobuf, of fewer than 128 bytes."""
  return bytes([number << 3 | 2, len(content)]) + content


def _comparison_files(config: Any, images: str | None) -> list[str]:
  """What to compare on: of the named files, or normal training images."""
  if images:
    paths = files.list_inputs(images, field='--images').images
    spread = np.linspace(0, len(paths) - 1, min(len(paths), _IMAGES))
    return [paths[int(index)] for index in spread]
  try:
    dataset = layouts.list_dataset(config.data)
  except (OSError, ValueError) as error:
    raise files.MissingDataError(
      f'no images to compare on ({error}); name some with --images'
    ) from error
  return [record.image for record in dataset.train[:_IMAGES]]
