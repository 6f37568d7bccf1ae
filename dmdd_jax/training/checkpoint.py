"""Checkpoints: the only file that knows Orbax.

A checkpoint is the training state and a small JSON document (`meta`): the
config, the teacher's fingerprint, the calibration, versions. Saving is
asynchronous and atomic; `wait` and `close` wait for it. Of several processes,
all save and restore, each its part.

Synopsis:

  manager = checkpoint.open_manager('runs/demo/surface/checkpoints', keep=2)
  checkpoint.save(manager, 500, state, meta)
  meta = checkpoint.read_meta(manager, 500)
  state = checkpoint.restore(manager, abstract_state, 500)
  checkpoint.close(manager)
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
from typing import Any, TypeVar

from absl import logging
import jax
import ml_collections
import orbax.checkpoint as ocp

from dmdd_jax import config as config_lib
from dmdd_jax import sharding
from dmdd_jax import storage
from dmdd_jax.models import dmdd
from dmdd_jax.training import train_state

# Fields that may differ between a checkpoint and the run that continues it:
# they change what is logged, read or kept, never what is learnt.
FREE_FIELDS = (
  'calibration.',
  'data.max_pixels',
  'data.root',
  'data.textures',
  'eval.',
  'mesh.',
  'student.remat',
  'teacher.weights',
  'train.cache_teacher',
  'train.checkpoint_every',
  'train.keep_checkpoints',
  'train.log_every',
)
# {field: (switch, the switch's values under which the field is read)}. A field
# that neither side reads may differ.
_SWITCHED_FIELDS = {
  'data.tile_overlap': ('data.tile_size', bool),
  'student.context_width': ('student.context', bool),
  'head.context_share': ('student.context', bool),
  'head.context_fusion': ('student.context', bool),
  'train.student.muon_learning_rate': ('train.student.kind', 'muon'.__eq__),
  'train.head.muon_learning_rate': ('train.head.kind', 'muon'.__eq__),
}


class CheckpointError(ValueError):
  """A checkpoint is missing, unreadable, or of another config."""


class DamagedError(CheckpointError):
  """A checkpoint is there but cannot be read."""


_T = TypeVar('_T')


def open_manager(
  directory: str | os.PathLike, keep: int | None = None
) -> ocp.CheckpointManager:
  """Opens a folder of checkpoints.

  Args:
    directory: local, or of any file system that epath knows (gs://).
    keep: creates the folder, clears the remains of an interrupted save, and
      keeps the last `keep` checkpoints; None only reads, also while another
      process saves.

  Raises:
    CheckpointError: the folder cannot be created or written.
  """
  path = storage.path(directory)
  if keep is None:
    # Its `read_only` would warn on every run, and forbids nothing done here.
    options = ocp.CheckpointManagerOptions(
      create=False, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(path, options=options)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    enable_async_checkpointing=True,
    cleanup_tmp_directories=True,
  )
  try:
    path.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(path, options=options)
  except OSError as error:
    raise CheckpointError(
      f'cannot write checkpoints to {path}: {error}. Choose another --workdir.'
    ) from error


def barrier(name: str) -> None:
  """Waits until all processes have come to `name`; a name is used once."""
  ocp.multihost.sync_global_processes(name)


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: train_state.TrainState,
  meta: Mapping[str, Any],
) -> None:
  """Starts saving a checkpoint; one of the same step is not replaced.

  Raises:
    CheckpointError: this one, or the one before it, could not be saved.
  """
  if step in manager.all_steps():
    return
  with _storage_errors(manager):
    if not manager.directory.exists():  # Orbax would begin a new one.
      raise FileNotFoundError('the folder has vanished')
    manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
      ),
    )


def wait(manager: ocp.CheckpointManager) -> None:
  """Waits for the save in progress; CheckpointError if it failed."""
  with _storage_errors(manager):
    manager.wait_until_finished()


@contextlib.contextmanager
def _storage_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Turns a failed save into a CheckpointError of one line."""
  try:
    yield
  except Exception as error:  # TensorStore's are ValueErrors and Exceptions.
    try:
      manager.reload()
      kept = f'the steps {sorted(manager.all_steps())} are kept'
    except OSError:
      kept = 'the earlier ones cannot be read either'
    raise CheckpointError(
      f'a checkpoint could not be saved to {manager.directory} ({kept}):'
      f' {_reason(error)}. Make room or make the folder writable; the same'
      ' command goes on from the newest checkpoint.'
    ) from error


def _reason(error: BaseException) -> str:
  """The first line, without the position in TensorStore's own source."""
  line = (str(error).splitlines() or [''])[0]
  for detail in (' [source locations=', ' [tensorstore_spec='):
    line = line.partition(detail)[0]
  if len(line) > 300:
    line = f'{line[:100]} ... {line[-200:]}'
  return f'{type(error).__name__}: {line}'


def latest_step(manager: ocp.CheckpointManager) -> int | None:
  """The newest step that was saved completely, or None."""
  return manager.latest_step()


def read_newest(
  manager: ocp.CheckpointManager,
  read: Callable[[int], _T],
  step: int | None = None,
) -> _T:
  """Returns `read(step)` of the newest checkpoint that can be read.

  Damaged ones are skipped; the log names them and the reason. All processes
  read one storage, and so see the same damage.

  Args:
    manager: of the folder.
    read: reads a checkpoint by its step; raises `DamagedError` if it cannot.
    step: read this one alone.

  Raises:
    CheckpointError: there is no checkpoint, or all are damaged.
  """
  if step is not None:
    return read(_existing(manager, step))
  _existing(manager, None)
  steps, reasons = sorted(manager.all_steps(), reverse=True), []
  for candidate in steps:
    try:
      return read(candidate)
    except DamagedError as error:
      logging.warning('%s; trying the checkpoint before it', error)
      reasons.append(str(error))
  raise CheckpointError(
    f'no checkpoint in {manager.directory} can be read: {steps} are damaged;'
    f' use another --workdir to start again, or remove them. {reasons[0]}'
  )


def set_aside(manager: ocp.CheckpointManager, after: int) -> None:
  """Renames the checkpoints newer than one to STEP.damaged.

  Training takes those steps again, and would not save over them.
  """
  steps = [step for step in manager.all_steps() if step > after]
  if not steps:
    return
  for step in steps:
    source = manager.directory / str(step)
    target = manager.directory / f'{step}.damaged'
    if jax.process_index() == 0:
      if target.exists():
        target.rmtree()
      source.rename(target)
      logging.warning('%s is now %s', source, target)
  barrier(f'{manager.directory}: set aside')
  manager.reload()


def read_meta(
  manager: ocp.CheckpointManager, step: int | None = None
) -> dict[str, Any]:
  """The JSON document of a checkpoint, by default of the newest.

  Raises:
    CheckpointError: there is no such checkpoint.
    DamagedError: its document cannot be read.
  """
  item = ocp.args.Composite(meta=ocp.args.JsonRestore())
  return _read(manager, _existing(manager, step), item)['meta']


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
    CheckpointError: there is no such checkpoint.
    DamagedError: it cannot be read.
  """
  step = _existing(manager, step)
  abstract = jax.tree.map(_abstract, like)
  item = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
  restored = _read(manager, step, item)
  logging.info('restored step %d from %s', step, manager.directory)
  return restored['state']


def restore_alone(
  manager: ocp.CheckpointManager,
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[ml_collections.ConfigDict, train_state.TrainState, dict[str, Any]]:
  """Reads a checkpoint by itself: its config gives the shapes of its state.

  Args:
    manager: of the folder.
    step: which checkpoint, by default the newest.
    mesh: over which the state is replicated; all devices by default.

  Returns:
    The config, upgraded to the fields of today; the state; the metadata.

  Raises:
    CheckpointError: there is no such checkpoint.
    DamagedError: it cannot be read.
  """
  meta = read_meta(manager, step)
  config = config_lib.upgrade(meta['config'])
  abstract = jax.eval_shape(
    lambda: train_state.create(
      config, dmdd.from_config(config), jax.random.key(0)
    )
  )
  like = sharding.abstract_replicated(abstract, mesh)
  return config, restore(manager, like, step), meta


def _read(
  manager: ocp.CheckpointManager, step: int, item: ocp.args.Composite
) -> Any:
  try:
    return manager.restore(step, args=item)
  except Exception as error:  # TensorStore's are ValueErrors and Exceptions.
    raise DamagedError(
      f'checkpoint {manager.directory}/{step} cannot be read: {_reason(error)}'
    ) from error


def close(manager: ocp.CheckpointManager) -> None:
  """Waits for the save in progress and ends the manager's threads.

  Raises:
    CheckpointError: that save failed.
  """
  try:
    wait(manager)
  finally:
    manager.close()


def check_config(
  directory: str | os.PathLike,
  stored: Mapping[str, Any],
  config: ml_collections.ConfigDict,
) -> None:
  """Refuses to go on with a checkpoint of another config.

  Args:
    directory: of the checkpoints, for the message.
    stored: the checkpoint's config as nested dicts.
    config: the config of this run.

  Raises:
    CheckpointError: naming every differing field and both values.
  """
  upgraded = config_lib.upgrade(stored)
  old, new = (config_lib.as_json(c.to_dict()) for c in (upgraded, config))
  for field, (switch, is_on) in _SWITCHED_FIELDS.items():
    if not any(is_on(fields[switch]) for fields in (old, new)):
      del old[field], new[field]
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
  """`step`, or the newest; CheckpointError if there is none."""
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
