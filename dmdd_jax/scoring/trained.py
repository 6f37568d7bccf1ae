"""Reads a trained category: config, state, calibration and metadata.

Synopsis:

  config, state, calibration, meta = trained.load_workdir('runs/mvtec/screw')
"""

import math
import os
from typing import Any

import ml_collections

from dmdd_jax import storage
from dmdd_jax import verdict as verdict_lib
from dmdd_jax.data import images as images_lib
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.training import checkpoint
from dmdd_jax.training import train_state

Trained = tuple[
  ml_collections.ConfigDict,
  train_state.TrainState,
  calibration_lib.Calibration,
  dict[str, Any],
]


def load_workdir(
  workdir: str | os.PathLike, step: int | None = None
) -> Trained:
  """Reads a category's folder.

  Args:
    workdir: the folder that holds `checkpoints/`, or a folder with one such
      folder in it.
    step: the step of the checkpoint. By default the newest checkpoint that can
      be read; the log names the damaged ones.

  Returns:
    The config, the state, the calibration and the metadata.

  Raises:
    CheckpointError: there is no checkpoint, or it cannot be read.
  """
  directory = os.path.join(storage.absolute(workdir), 'checkpoints')
  if not storage.path(directory).is_dir():
    trained = [os.path.basename(folder) for folder in trained_folders(workdir)]
    if len(trained) == 1:
      return load_workdir(os.path.join(workdir, trained[0]), step)
    raise checkpoint.CheckpointError(
      f'{workdir} holds no checkpoints; name the folder of one trained'
      f' category ({", ".join(trained) or "there is none"}), or train first'
      ' (--mode train)'
    )
  manager = checkpoint.open_manager(directory)

  def read(step: int) -> Trained:
    try:
      config, state, meta = checkpoint.restore_alone(manager, step)
      calibration = calibration_lib.from_dict(meta['calibration'])
      _check(calibration)
    except checkpoint.CheckpointError:
      raise
    # Of the many places that read the document.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise checkpoint.DamagedError(
        f'the metadata of checkpoint {directory}/{step} cannot be used'
        f' ({type(error).__name__}: {error}); they are not what training wrote'
      ) from error
    images_lib.allow_pixels(config.data.max_pixels)
    return config, state, calibration, meta

  try:
    return checkpoint.read_newest(manager, read, step)
  finally:
    checkpoint.close(manager)


def _check(calibration: calibration_lib.Calibration) -> None:
  """Raises ValueError where a number of a calibration cannot be one."""
  for name in ('image_threshold', 'pixel_threshold'):
    verdict_lib.check_threshold(name, getattr(calibration, name))
  for name, value in (
    ('image_scale', calibration.image_scale),
    *vars(calibration.fusion).items(),
  ):
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f'{name} is {value!r}, not a number')
    if not math.isfinite(value):
      raise ValueError(f'{name} is {value}, not finite')


def trained_folders(workdir: str | os.PathLike) -> list[str]:
  """The paths of trained categories in the folder of a run, sorted."""
  return storage.folders(workdir, 'checkpoints')
