"""Checkpoints: the only file that knows Orbax.

A checkpoint is the training state and a small JSON document (`meta`): the
config, the teacher's fingerprint, the calibration, versions. Saving is
asynchronous; `close` waits.

Synopsis:

  manager = checkpoint.open_manager('runs/demo/surface/checkpoints', keep=2)
  checkpoint.save(manager, 500, state, meta)
  state, meta = checkpoint.restore(manager, abstract_state)
  checkpoint.close(manager)
"""

from collections.abc import Mapping
import os
from typing import Any

from absl import logging
from etils import epath
import jax
import ml_collections
import orbax.checkpoint as ocp

from dmdd_jax import train_state

# Fields that may differ between a checkpoint and the run that continues it:
# they change what is logged or read, never what is learnt.
FREE_FIELDS = (
  'calibration.',
  'data.root',
  'data.textures',
  'eval.',
  'teacher.weights',
  'train.checkpoint_every',
  'train.keep_checkpoints',
  'train.log_every',
)


class CheckpointError(ValueError):
  """A checkpoint is missing, unreadable, or of another config."""


def open_manager(
  directory: str | os.PathLike, keep: int = 2
) -> ocp.CheckpointManager:
  """Opens or creates a folder of checkpoints; the last `keep` stay.

  Raises:
    CheckpointError: the folder cannot be created or written.
  """
  path = epath.Path(directory)
  if not path.is_absolute() and '://' not in str(path):
    path = epath.Path(os.path.abspath(directory))
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise CheckpointError(
      f'cannot write checkpoints to {path}: {error}. Choose another --workdir.'
    ) from error
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, enable_async_checkpointing=True
  )
  return ocp.CheckpointManager(path, options=options)


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: train_state.TrainState,
  meta: Mapping[str, Any],
) -> None:
  """Starts saving a checkpoint; one of the same step is left as it is."""
  if step in manager.all_steps():
    return
  manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
    ),
  )


def latest_step(manager: ocp.CheckpointManager) -> int | None:
  """The newest step that was saved completely, or None."""
  return manager.latest_step()


def read_meta(
  manager: ocp.CheckpointManager, step: int | None = None
) -> dict[str, Any]:
  """The JSON document of a checkpoint, by default of the newest.

  Raises:
    CheckpointError: there is no checkpoint, or its document cannot be read.
  """
  step = _existing(manager, step)
  try:
    restored = manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )
  except (OSError, ValueError, KeyError) as error:
    raise CheckpointError(
      f'checkpoint {manager.directory}/{step} cannot be read: {error}'
    ) from error
  return restored['meta']


def restore(
  manager: ocp.CheckpointManager,
  like: train_state.TrainState,
  step: int | None = None,
) -> train_state.TrainState:
  """Reads a state, by default the newest.

  Args:
    manager: of the folder.
    like: a state, or a tree of `jax.ShapeDtypeStruct`, whose shapes, types and
      shardings the result has.
    step: which checkpoint.

  Raises:
    CheckpointError: there is no such checkpoint, or it cannot be read.
  """
  step = _existing(manager, step)
  abstract = jax.tree.map(_abstract, like)
  try:
    restored = manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    )
  except (OSError, ValueError, KeyError) as error:
    raise CheckpointError(
      f'checkpoint {manager.directory}/{step} cannot be read: {error}'
    ) from error
  logging.info('restored step %d from %s', step, manager.directory)
  return restored['state']


def close(manager: ocp.CheckpointManager) -> None:
  """Waits for what is being saved and ends the manager's threads."""
  manager.wait_until_finished()
  manager.close()


def check_config(
  directory: str | os.PathLike,
  found: Mapping[str, Any],
  config: ml_collections.ConfigDict,
) -> None:
  """Refuses to go on with a checkpoint of another config.

  Args:
    directory: of the checkpoints, for the message.
    found: the checkpoint's config as nested dicts.
    config: the config of this run.

  Raises:
    CheckpointError: naming every differing field and both values.
  """
  old, new = _flatten(found), _flatten(config.to_dict())
  differing = [
    f'  {field}: {old.get(field, "(absent)")!r} in the checkpoint,'
    f' {new.get(field, "(absent)")!r} now'
    for field in sorted({*old, *new})
    if not field.startswith(FREE_FIELDS) and old.get(field) != new.get(field)
  ]
  if differing:
    raise CheckpointError(
      f'the checkpoints in {directory} are of another config:\n'
      + '\n'.join(differing)
      + '\nUse another --workdir, or the same config to go on.'
    )


def _existing(manager: ocp.CheckpointManager, step: int | None) -> int:
  """`step`, or the newest; CheckpointError when it is not there."""
  steps = sorted(manager.all_steps())
  if not steps:
    raise CheckpointError(
      f'there is no checkpoint in {manager.directory}; train first'
      ' (--mode train)'
    )
  if step is not None and step not in steps:
    raise CheckpointError(
      f'there is no checkpoint of step {step} in {manager.directory}; there'
      f' are {steps}'
    )
  return steps[-1] if step is None else step


def _abstract(leaf: Any) -> Any:
  """The shape, type and sharding of an array; an abstract leaf as it is."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf
  return ocp.utils.to_shape_dtype_struct(leaf)


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}; tuples become lists, as JSON has them."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(_flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat
