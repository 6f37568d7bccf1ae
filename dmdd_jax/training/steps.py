"""The pure steps of training, and how they are jitted.

A batch is a dict of arrays (see docs/method.md): `image` (B, S, S, 3) is x_a,
`normal` x_n, `mask` (B, S, S, 1). `normal_taps`, the teacher's features of x_n,
can take the place of `normal` (see `TeacherCache`). Shapes are global: jit's
partitioner takes every mean over all devices of the mesh, batch-norm statistics
too.

Synopsis:

  step_fns = steps.make_train_steps(config, model, mesh)
  state, metrics = step_fns['distill'](state, batch)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dmdd_jax import sharding
from dmdd_jax.models import dmdd
from dmdd_jax.training import losses
from dmdd_jax.training import train_state

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# What each phase trains.
PHASES = {
  'distill': ('student',),
  'segment': ('head',),
  'joint': ('student', 'head'),
}


def phase(config: ml_collections.ConfigDict, step: int) -> str:
  """Which step function takes step number `step` (from 0)."""
  if config.head.kind == 'none':
    return 'distill'
  if config.train.joint:
    return 'joint'
  return 'distill' if step < config.train.distill_steps else 'segment'


def head_is_trained(config: ml_collections.ConfigDict, steps: int) -> bool:
  """Whether a training of `steps` steps has trained the head."""
  if config.head.kind == 'none' or not steps:
    return False
  return phase(config, steps - 1) != 'distill'


def _paired(first: jax.Array, second: jax.Array) -> jax.Array:
  """Two batches (B, ...) as one (2 B, ...), whose rows take turns.

  One after the other, half of the rows would have to move to another device.
  """
  pairs = jnp.stack([first, second], axis=1)
  return pairs.reshape(-1, *first.shape[1:])


def _unpaired(features: dmdd.Features) -> tuple[dmdd.Features, dmdd.Features]:
  """Undoes `_paired`, for each level."""
  pairs = [f.reshape(-1, 2, *f.shape[1:]) for f in features]
  return tuple(p[:, 0] for p in pairs), tuple(p[:, 1] for p in pairs)


def distillation_loss(
  config: ml_collections.ConfigDict,
  normality: dmdd.Features,
  abnormality: dmdd.Features,
  taps_image: dmdd.Features,
  taps_normal: dmdd.Features,
  mask: jax.Array,
) -> tuple[jax.Array, Metrics]:
  """NGM and AIM, weighted, of features of x_a and the teacher's of both."""
  options = config.loss
  masks = [losses.resize_mask(mask, tap.shape[1:3]) for tap in taps_image]
  total, metrics = jnp.float32(0.0), {}
  if options.ngm_weight:
    metrics['ngm'] = losses.ngm(
      normality,
      taps_normal,
      masks if options.ngm_normal_only else None,
      options.ngm_flat,
      options.focus,
    )
    total += options.ngm_weight * metrics['ngm']
  if options.aim_weight:
    target = taps_image if options.aim_target == 'image' else taps_normal
    metrics['aim'] = losses.aim(
      abnormality,
      target,
      masks,
      options.aim,
      options.aim_margin,
      options.focus,
    )
    total += options.aim_weight * metrics['aim']
  return total, metrics


def _teach(
  model: dmdd.DMDD, variables: Mapping[str, Any], batch: Batch
) -> tuple[dmdd.Features, dmdd.Features]:
  """The teacher's features of x_n and of x_a, in one pass."""
  image = batch['image']
  if 'normal_taps' in batch:
    return batch['normal_taps'], model.apply(variables, image, method='teach')
  both = _paired(batch['normal'], image)
  return _unpaired(model.apply(variables, both, method='teach'))


def _student_pass(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  variables: Mapping[str, Any],
  batch: Batch,
) -> tuple[jax.Array, Metrics, Any, Any]:
  """Teacher once on x_n and x_a, student in training mode, distillation loss.

  Returns:
    The loss, its terms, the student's new statistics, and (normality,
    abnormality, taps) of x_a for the head.
  """
  image, mask = batch['image'], batch['mask']
  taps_normal, taps_image = _teach(model, variables, batch)
  inputs, seen, target = image, taps_image, taps_normal
  if config.loss.on_normal:
    inputs = _paired(batch['normal'], image)
    seen = tuple(map(_paired, taps_normal, taps_image))
    target = tuple(map(_paired, taps_normal, taps_normal))
    mask = _paired(jnp.zeros_like(mask), mask)
  (normality, abnormality), updated = model.apply(
    variables, inputs, seen, True, method='study', mutable=['batch_stats']
  )
  loss, metrics = distillation_loss(
    config, normality, abnormality, seen, target, mask
  )
  if config.loss.on_normal:
    normality = _unpaired(normality)[1]
    abnormality = _unpaired(abnormality)[1]
  features = (normality, abnormality, taps_image)
  return loss, metrics, updated['batch_stats']['student'], features


def _head_pass(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  variables: Mapping[str, Any],
  features: Any,
  mask: jax.Array,
) -> tuple[jax.Array, Any]:
  """The head in training mode: its loss and its new statistics."""
  output, updated = model.apply(
    variables, *features, True, method='segment', mutable=['batch_stats']
  )
  target = losses.resize_mask(mask, output.logit.shape[1:3])
  loss = losses.segmentation(
    output.logit[..., None], target, config.loss.segmentation
  )
  return loss, updated['batch_stats']['head']


def gradients(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  parts: tuple[str, ...],
  state: train_state.TrainState,
  batch: Batch,
) -> tuple[Metrics, dict[str, Any], dict[str, Any]]:
  """Losses, their gradient in `parts`, and the parts' new statistics.

  A part that is not trained costs nothing: with ('student',) the head does not
  run; with ('head',) the student runs without statistics or gradient, and x_n
  is not read.
  """

  def loss_fn(params: Mapping[str, Any]):
    trained = state.replace(params={**state.params, **params})
    variables = train_state.variables(trained)
    total, metrics, stats = jnp.float32(0.0), {}, {}
    if 'student' in parts:
      total, metrics, stats['student'], features = _student_pass(
        config, model, variables, batch
      )
    else:
      taps = model.apply(variables, batch['image'], method='teach')
      features = (
        *model.apply(variables, batch['image'], taps, method='study'),
        taps,
      )
    if 'head' in parts:
      loss, stats['head'] = _head_pass(
        config, model, variables, features, batch['mask']
      )
      metrics['segmentation'] = loss
      total += loss
    return total, (metrics, stats)

  trained = {part: state.params[part] for part in parts}
  gradient = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, (metrics, stats)), grads = gradient(trained)
  return {'loss': loss, **metrics}, grads, stats


def _accumulated(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  parts: tuple[str, ...],
  state: train_state.TrainState,
  batch: Batch,
) -> tuple[Metrics, dict[str, Any], dict[str, Any]]:
  """`gradients` of a batch in parts, one after the other: their means.

  Part j takes the rows j, j + n, j + 2 n ... of n parts, so that every device
  splits the rows it holds. The statistics move once per part.
  """
  rows = config.train.microbatch
  count = batch['image'].shape[0] // rows
  pieces = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(rows, count, *x.shape[1:]), 1, 0),
    dict(batch),
  )

  def add(carry, piece):
    total, stats = carry
    moved = state.replace(batch_stats={**state.batch_stats, **stats})
    metrics, grads, stats = gradients(config, model, parts, moved, piece)
    return (jax.tree.map(jnp.add, total, (metrics, grads)), stats), None

  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(
    lambda: gradients(config, model, parts, state, first)[:2]
  )
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  start = (zeros, {part: state.batch_stats[part] for part in parts})
  (total, stats), _ = jax.lax.scan(add, start, pieces)
  metrics, grads = jax.tree.map(lambda x: x / count, total)
  return metrics, grads, stats


def batch_gradients(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  parts: tuple[str, ...],
  state: train_state.TrainState,
  batch: Batch,
) -> tuple[Metrics, dict[str, Any], dict[str, Any]]:
  """`gradients`, at once or in parts of `train.microbatch` rows."""
  compute = _accumulated if config.train.microbatch else gradients
  return compute(config, model, parts, state, batch)


def train_step(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  optimizers: Mapping[str, optax.GradientTransformation],
  parts: tuple[str, ...],
  state: train_state.TrainState,
  batch: Batch,
) -> tuple[train_state.TrainState, Metrics]:
  """One update of `parts`: ('student',), ('head',) or both.

  A loss or gradient that is not finite freezes the state: it stays as it is at
  this step and at all later ones. The host looks at losses only now and then,
  and this is the state to examine.
  """
  metrics, grads, stats = batch_gradients(config, model, parts, state, batch)
  metrics['gradient_norm'] = optax.global_norm(grads)
  params, opt_state = dict(state.params), dict(state.opt_state)
  for part in parts:
    updates, opt_state[part] = optimizers[part].update(
      grads[part], state.opt_state[part], state.params[part]
    )
    params[part] = optax.apply_updates(state.params[part], updates)
  updated = state.replace(
    step=state.step + 1,
    params=params,
    batch_stats={**state.batch_stats, **stats},
    opt_state=opt_state,
  )
  finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(
    metrics['gradient_norm']
  )
  is_sound = finite & (train_state.frozen_at(state) < 0)
  state = jax.tree.map(
    lambda new, old: jnp.where(is_sound, new, old),
    updated,
    train_state.freeze(state),
  )
  return state, metrics


def make_train_steps(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  mesh: jax.sharding.Mesh,
) -> dict[str, Callable[..., tuple[train_state.TrainState, Metrics]]]:
  """The jitted step function of each phase; `state` is donated."""
  optimizers = train_state.make_optimizers(config, mesh)
  replicated = sharding.replicated(mesh)

  def jitted(parts: tuple[str, ...]):
    def step(state, batch):
      return train_step(config, model, optimizers, parts, state, batch)

    return jax.jit(
      step,
      donate_argnums=0,
      in_shardings=(replicated, sharding.batched(mesh)),
      out_shardings=replicated,
    )

  return {name: jitted(parts) for name, parts in PHASES.items()}


class TeacherCache:
  """The teacher's features of a fixed set of images, on every device.

  cache = TeacherCache(model, mesh, variables, images, batch_size=32)
  batch['normal_taps'] = cache(rows)  # The features of images[rows].
  """

  def __init__(
    self,
    model: dmdd.DMDD,
    mesh: jax.sharding.Mesh,
    variables: Mapping[str, Any],
    images: np.ndarray,
    batch_size: int,
  ):
    """Computes the features of images (M, S, S, 3) uint8, M >= 1.

    Each device computes its share of `batch_size` images at a time, a multiple
    of their number.
    """
    replicated, batched = sharding.replicated(mesh), sharding.batched(mesh)

    def teach(variables, rows):
      images = rows.astype(jnp.float32) / 255.0
      return model.apply(variables, images, method='teach')

    teach = jax.jit(
      teach, in_shardings=(replicated, batched), out_shardings=batched
    )
    parts = []
    for start in range(0, len(images), batch_size):
      rows = images[start : start + batch_size]
      edges = [(0, batch_size - len(rows))] + [(0, 0)] * 3
      padded = sharding.local_rows(mesh, np.pad(rows, edges))
      batch = sharding.to_global(mesh, {'rows': padded})
      taps = sharding.to_host(mesh, teach(variables, batch['rows']))
      parts.append([tap[: len(rows)] for tap in taps])
    taps = tuple(np.concatenate(level) for level in zip(*parts))
    self.taps = sharding.replicate(mesh, taps)
    self._look_up = jax.jit(
      lambda taps, rows: tuple(jnp.take(tap, rows, axis=0) for tap in taps),
      in_shardings=(replicated, batched),
      out_shardings=batched,
    )

  def __call__(self, rows: jax.Array) -> tuple[jax.Array, ...]:
    """The features of the images `rows` (B,) int32, over the mesh."""
    return self._look_up(self.taps, rows)

  @property
  def nbytes(self) -> int:
    """Bytes on each device."""
    return sum(tap.nbytes for tap in self.taps)
