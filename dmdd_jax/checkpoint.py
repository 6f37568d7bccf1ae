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

from dmdd_jax import sharding
from dmdd_jax import storage
from dmdd_jax import train_state
from dmdd_jax.models import dmdd

# Fields that may differ between a checkpoint and the run that continues it:
# they change what is logged, read or kept, never what is learnt.
FREE_FIELDS = (
  'calibration.',
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
# {field: (another, by whose value the first means something)}; where it means
# nothing to either side it may differ.
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
    keep: creates the folder, clears what an interrupted save has left in it,
      and keeps the last `keep` of what is saved; None only reads, also while
      another process saves.

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
  """Waits until all processes have come to this name, which comes once."""
  ocp.multihost.sync_global_processes(name)


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: train_state.TrainState,
  meta: Mapping[str, Any],
) -> None:
  """Starts saving a checkpoint; one of the same step is left as it is.

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
  """Waits for what is being saved; CheckpointError if that failed."""
  with _storage_errors(manager):
    manager.wait_until_finished()


@contextlib.contextmanager
def _storage_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Says in one line what kept a checkpoint from being saved."""
  try:
    yield
  except Exception as error:  # TensorStore's are ValueErrors and Exceptions.
    try:
      manager.reload()
      kept = f'those of the steps {sorted(manager.all_steps())} are kept'
    except OSError:
      kept = 'those before it are not there either'
    raise CheckpointError(
      f'a checkpoint could not be saved to {manager.directory} ({kept}):'
      f' {_reason(error)}. Make room or make the folder writable; the same'
      ' command goes on from the newest checkpoint.'
    ) from error


def _reason(error: BaseException) -> str:
  """The first line, without where in its source TensorStore raised it."""
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

  One that is damaged is left out, and the log says which and why. Several
  processes see one storage, and so the same damage.

  Args:
    manager: of the folder.
    read: reads a checkpoint by its step; raises `DamagedError` if it cannot.
    step: take this one and no other.

  Raises:
    CheckpointError: there is none, or none that can be read.
  """
  if step is not None:
    return read(_existing(manager, step))
  _existing(manager, None)
  steps = sorted(manager.all_steps(), reverse=True)
  for candidate in steps:
    try:
      return read(candidate)
    except DamagedError as error:
      logging.warning('%s; trying the checkpoint before it', error)
  raise CheckpointError(
    f'no checkpoint in {manager.directory} can be read: {steps} are damaged;'
    ' use another --workdir to start again, or remove them'
  )


def set_aside(manager: ocp.CheckpointManager, after: int) -> None:
  """Renames the checkpoints newer than one to STEP.damaged.

  Otherwise the same steps, taken again, would not be saved.
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
  """Reads a checkpoint with nothing else at hand: its config says its shapes.

  Args:
    manager: of the folder.
    step: which checkpoint, by default the newest.
    mesh: over which the state is replicated; all devices by default.

  Returns:
    The config and the state, and the metadata.

  Raises:
    CheckpointError: there is no such checkpoint.
    DamagedError: it cannot be read.
  """
  meta = read_meta(manager, step)
  config = ml_collections.ConfigDict(meta['config'])
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
  """Waits for what is being saved and ends the manager's threads.

  Raises:
    CheckpointError: what was being saved could not be.
  """
  try:
    wait(manager)
  finally:
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
  for field, (switch, is_on) in _SWITCHED_FIELDS.items():
    if not any(is_on(fields.get(switch)) for fields in (old, new)):
      old.pop(field, None)
      new.pop(field, None)
  differing = [
    f'  {field}: {old.get(field, "(absent)")!r} in the checkpoint,'
    f' {new.get(field, "(absent)")!r} now'
    for field in sorted({*old, *new})
    if not field.startswith(FREE_FIELDS)
    and old.get(field) != new.get(field)
    # A switch younger than the checkpoint, and off: as if it were not there.
    and (field in old or new[field])
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
