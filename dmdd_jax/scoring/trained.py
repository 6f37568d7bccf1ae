"""Reads a trained category: config, state, calibration and metadata.

Synopsis:

  config, state, calibration, meta = trained.load_workdir('runs/mvtec/screw')
"""

import os
from typing import Any

import ml_collections

from dmdd_jax import storage
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
    config, state, meta = checkpoint.restore_alone(manager, step)
    images_lib.allow_pixels(config.data.max_pixels)
    return config, state, calibration_lib.from_dict(meta['calibration']), meta

  try:
    return checkpoint.read_newest(manager, read, step)
  finally:
    checkpoint.close(manager)


def trained_folders(workdir: str | os.PathLike) -> list[str]:
  """The paths of trained categories in the folder of a run, sorted."""
  return storage.folders(workdir, 'checkpoints')
