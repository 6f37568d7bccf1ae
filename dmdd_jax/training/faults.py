"""A step whose loss is not finite: what is kept of it, and its replay.

`WORKDIR/fault` holds `batch.npz`, the whole global batch, and `state`, a
checkpoint of the state that the step began with. If the loss was finite and the
update was not, it is the state after the step.

Synopsis:

  faults.save('runs/mvtec/screw', step, state, meta, batch)
  print(faults.replay('runs/mvtec/screw'))
"""

from collections.abc import Mapping
import os
from typing import Any

import jax
import numpy as np

from dmdd_jax import sharding
from dmdd_jax import storage
from dmdd_jax.models import dmdd
from dmdd_jax.training import checkpoint
from dmdd_jax.training import steps
from dmdd_jax.training import train_state

_NAMED = 5  # How many arrays a line spells out.


def save(
  workdir: str,
  step: int,
  state: train_state.TrainState,
  meta: Mapping[str, Any],
  batch: Mapping[str, np.ndarray] | None,
) -> None:
  """Keeps a step's batch and state in WORKDIR/fault; replaces earlier ones.

  Args:
    workdir: of the category.
    step: that took the batch.
    state: before it; if only its update was not finite, after it.
    meta: 'config', 'phase', and 'found', which says what was not finite.
    batch: global; None in processes that write no files.

  Raises:
    CheckpointError, OSError: it cannot be written.
  """
  folder = os.path.join(workdir, 'fault')
  try:
    if batch is not None:
      if storage.path(folder).exists():
        storage.path(folder).rmtree()
      with storage.writing(os.path.join(folder, 'batch.npz')) as file:
        np.savez(file, **batch)
  finally:
    checkpoint.barrier(folder)  # The other processes wait there.
  manager = checkpoint.open_manager(os.path.join(folder, 'state'), keep=1)
  try:
    checkpoint.save(manager, step, state, meta)
  finally:
    checkpoint.close(manager)


def replay(workdir: str | os.PathLike) -> str:
  """Takes the step of WORKDIR/fault again, on one device.

  Returns:
    Lines that name the arrays that are not finite: of the batch, the state, the
    losses and the gradient.

  Raises:
    CheckpointError: there is no fault, or it cannot be read.
  """
  folder = os.path.join(storage.absolute(workdir), 'fault')
  if not storage.path(folder).is_dir():
    raise checkpoint.CheckpointError(
      f'{workdir} holds no fault/: name the folder of the category whose'
      ' training stopped at a loss that was not finite'
    )
  manager = checkpoint.open_manager(os.path.join(folder, 'state'))
  try:
    one = sharding.make_mesh(jax.local_devices()[:1])
    config, state, meta = checkpoint.restore_alone(manager, mesh=one)
  finally:
    checkpoint.close(manager)
  path = storage.path(os.path.join(folder, 'batch.npz'))
  with path.open('rb') as file:
    batch = dict(np.load(file))
  parts = steps.PHASES[meta['phase']]
  take = jax.jit(
    lambda state, batch: steps.batch_gradients(
      config, dmdd.from_config(config), parts, state, batch
    )
  )
  metrics, grads, _ = take(state, batch)
  lines = [f'step {int(state.step)} ({meta["phase"]}): {meta["found"]}']
  for name, tree in (
    ('batch', batch),
    ('state', state),
    ('losses', metrics),
    ('gradient', grads),
  ):
    lines.append(f'{name}: {_describe(tree)}')
  values = ', '.join(f'{k} {float(v):.6g}' for k, v in metrics.items())
  return '\n'.join([*lines, values])


def _describe(tree: Any) -> str:
  """A line that names the arrays of a tree that are not finite."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  broken = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, leaf in leaves
    if not np.all(np.isfinite(np.asarray(leaf, np.float64)))
  ]
  if not broken:
    return f'all of {len(leaves)} arrays are finite'
  named = ', '.join(broken[:_NAMED])
  named += ', ...' if len(broken) > _NAMED else ''
  return f'{len(broken)} of {len(leaves)} arrays are not finite: {named}'
