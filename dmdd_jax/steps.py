"""The pure steps of training and prediction, and how they are jitted.

A batch is a dict of arrays (see docs/method.md): `image` (B, S, S, 3) is x_a,
`normal` x_n, `mask` (B, S, S, 1); in place of `normal` there may be
`normal_taps`, the teacher's features of x_n (see `TeacherCache`). Shapes are
global: over a mesh every mean is taken over all devices, batch-norm statistics
too, by jit's partitioner.

Synopsis:

  step_fns = steps.make_train_steps(config, model, mesh)
  state, metrics = step_fns['distill'](state, batch)
  predict = steps.make_predict_step(config, model, mesh)
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dmdd_jax import losses
from dmdd_jax import sharding
from dmdd_jax import train_state
from dmdd_jax.models import dmdd
from dmdd_jax.models import student as student_lib

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
  """Whether so many steps have trained the head at all."""
  if config.head.kind == 'none' or not steps:
    return False
  return phase(config, steps - 1) != 'distill'


def _split(features: Any, batch: int) -> tuple[Any, Any]:
  """Undoes a concatenation of two batches, for each level."""
  return (
    tuple(f[:batch] for f in features),
    tuple(f[batch:] for f in features),
  )


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
  losses.check_options(options)
  masks = [losses.resize_mask(mask, tap.shape[1:3]) for tap in taps_image]
  focus = options.get('focus', 0.0)  # Faults kept before this field.
  total, metrics = jnp.float32(0.0), {}
  if options.ngm_weight:
    metrics['ngm'] = losses.ngm(
      normality,
      taps_normal,
      masks if options.ngm_normal_only else None,
      options.ngm_flat,
      focus,
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
      focus,
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
  both = jnp.concatenate([batch['normal'], image])
  taps = model.apply(variables, both, method='teach')
  return _split(taps, image.shape[0])


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
  size = image.shape[0]
  taps_normal, taps_image = _teach(model, variables, batch)
  inputs, seen, target = image, taps_image, taps_normal
  if config.loss.on_normal:
    inputs = jnp.concatenate([batch['normal'], image])
    seen = tuple(map(jnp.concatenate, zip(taps_normal, taps_image)))
    target = tuple(jnp.concatenate([t, t]) for t in taps_normal)
    mask = jnp.concatenate([jnp.zeros_like(mask), mask])
  (normality, abnormality), updated = model.apply(
    variables, inputs, seen, True, method='study', mutable=['batch_stats']
  )
  loss, metrics = distillation_loss(
    config, normality, abnormality, seen, target, mask
  )
  if config.loss.on_normal:
    normality = _split(normality, size)[1]
    abnormality = _split(abnormality, size)[1]
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

  Nothing is computed for what is not trained: with ('student',) the head does
  not run, with ('head',) the student runs without statistics or gradient and
  x_n is not looked at.
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

  At a loss or gradient that is not finite the state stands still, at this step
  and all later ones, with -1 - step in the place of its step: losses are looked
  at only now and then, and this is the state to look into.
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
  stopped = state.replace(step=jnp.minimum(state.step, -1 - state.step))
  finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(
    metrics['gradient_norm']
  )
  going_on = finite & (state.step >= 0)
  state = jax.tree.map(
    lambda new, old: jnp.where(going_on, new, old), updated, stopped
  )
  return state, metrics


def make_train_steps(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  mesh: jax.sharding.Mesh,
) -> dict[str, Callable[..., tuple[train_state.TrainState, Metrics]]]:
  """The jitted step function of each phase; `state` is donated."""
  optimizers = train_state.make_optimizers(config)
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
    """Computes the features of images (M, S, S, 3) uint8, M >= 1."""
    replicated = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=replicated)
    def teach(variables, rows):
      return model.apply(
        variables, rows.astype(jnp.float32) / 255.0, method='teach'
      )

    parts = []
    for start in range(0, len(images), batch_size):
      rows = images[start : start + batch_size]
      edges = [(0, batch_size - len(rows))] + [(0, 0)] * 3
      found = jax.device_get(teach(variables, np.pad(rows, edges)))
      parts.append([tap[: len(rows)] for tap in found])
    taps = tuple(np.concatenate(level) for level in zip(*parts))
    self.taps = sharding.replicate(mesh, taps)
    self._look_up = jax.jit(
      lambda taps, rows: tuple(jnp.take(tap, rows, axis=0) for tap in taps),
      in_shardings=(replicated, sharding.batched(mesh)),
      out_shardings=sharding.batched(mesh),
    )

  def __call__(self, rows: jax.Array) -> tuple[jax.Array, ...]:
    """The features of some rows (B,) int32 of the images, over the mesh."""
    return self._look_up(self.taps, rows)

  @property
  def nbytes(self) -> int:
    """Bytes on each device."""
    return sum(tap.nbytes for tap in self.taps)


@struct.dataclass
class Prediction:
  """What is said of B images of side S, all float32.

  Attributes:
    map: (B, S, S) anomaly map, higher is more anomalous (see `Fusion`).
    score: (B,) image score, the mean of the highest pixels of `Fusion.scored`.
    maps_mean: (B, S, S) mean of the distance maps, in [0, 2], the control.
    maps_mean_score: (B,) its image score.
    distance: (B, S, S) the maps as the fusion takes them, at most 2; below 0
      where less than the `dmdd.PositionBias`.
    probability: (B, S, S) the head's, in [0, 1], before the fusion.
  """

  map: jax.Array
  score: jax.Array
  maps_mean: jax.Array
  maps_mean_score: jax.Array
  distance: jax.Array
  probability: jax.Array


@struct.dataclass
class Fusion:
  """How probability and distance become one map, in units of normal pixels.

  map = head_weight * (probability - head_center) / head_scale
        + maps_weight * (distance - maps_center) / maps_scale

  Centres and scales come from held-out normal images (see calibration.py). The
  head's probability, unlike its logit, can only add to the distances: a head
  trained on synthetic anomalies cannot silence a defect it has never seen the
  like of. Without a head, `head_weight` is 0.

  An image is scored by such a map with `score_head_weight` in the place of
  `head_weight`: the head outlines defects best, but is sure of some normal
  spots on which the distances are not.
  """

  head_center: jax.typing.ArrayLike = 0.0
  head_scale: jax.typing.ArrayLike = 1.0
  maps_center: jax.typing.ArrayLike = 0.0
  maps_scale: jax.typing.ArrayLike = 1.0
  head_weight: jax.typing.ArrayLike = 1.0
  maps_weight: jax.typing.ArrayLike = 0.0
  # As it was in checkpoints of before this weight.
  score_head_weight: jax.typing.ArrayLike = 1.0

  def __call__(self, probability: jax.Array, distance: jax.Array) -> jax.Array:
    """Fuses two arrays of one shape, numpy's or jax's."""
    head = (probability - self.head_center) / self.head_scale
    maps = (distance - self.maps_center) / self.maps_scale
    return self.head_weight * head + self.maps_weight * maps

  def scored(self, probability: jax.Array, distance: jax.Array) -> jax.Array:
    """The map whose highest pixels are the image's score; likewise."""
    fusion = self.replace(head_weight=self.score_head_weight)
    return fusion(probability, distance)


def image_score(maps: jax.Array, top_pixels: int) -> jax.Array:
  """Mean of the `top_pixels` highest values of each map: (B, ...) -> (B,)."""
  if top_pixels < 1:
    raise ValueError(
      f'config.eval.score_top_pixels must be >= 1, is {top_pixels}'
    )
  flat = maps.reshape(maps.shape[0], -1)
  top, _ = jax.lax.top_k(flat, min(top_pixels, flat.shape[1]))
  return jnp.mean(top, axis=-1)


def smooth(maps: jax.Array, sigma: float) -> jax.Array:
  """Gaussian smoothing of maps (B, H, W), mirrored at the border.

  Args:
    maps: float32.
    sigma: in pixels; 0 returns the maps as they are. The kernel ends at four
      sigma.
  """
  if sigma < 0.0:
    raise ValueError(f'config.eval.smoothing_sigma must be >= 0, is {sigma}')
  if not sigma:
    return maps
  radius = int(4.0 * sigma + 0.5)
  kernel = jnp.exp(-0.5 * jnp.square(jnp.arange(-radius, radius + 1) / sigma))
  kernel = kernel / jnp.sum(kernel)
  edges = ((0, 0), (radius, radius), (radius, radius), (0, 0))
  x = jnp.pad(maps[..., None], edges, mode='symmetric')
  for shape in ((-1, 1, 1, 1), (1, -1, 1, 1)):
    x = jax.lax.conv_general_dilated(
      x,
      kernel.reshape(shape),
      (1, 1),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST,
    )
  return x[..., 0]


def predict_step(
  model: dmdd.DMDD,
  options: ml_collections.ConfigDict,
  variables: Mapping[str, Any],
  fusion: Fusion,
  images: jax.Array,
) -> Prediction:
  """Maps and scores of images (B, S, S, 3), float32 in [0, 1] or uint8.

  Args:
    model: of the variables.
    options: `config.eval`: `score_top_pixels` and `smoothing_sigma` are used.
    variables: of all parts.
    fusion: from the calibration.
    images: RGB.
  """
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255.0
  output = model.apply(variables, images)
  probability = jax.nn.sigmoid(output.logit)
  maps = jnp.stack([probability, output.distance, output.maps_mean], axis=-1)
  maps = student_lib.resize_bilinear(maps, images.shape[1:3])
  # Before they are fused: the calibration sees what the fusion will see.
  probability, distance, maps_mean = (
    smooth(maps[..., i], options.smoothing_sigma) for i in range(3)
  )
  scored = fusion.scored(probability, distance)
  return Prediction(
    map=fusion(probability, distance),
    score=image_score(scored, options.score_top_pixels),
    maps_mean=maps_mean,
    maps_mean_score=image_score(maps_mean, options.score_top_pixels),
    distance=distance,
    probability=probability,
  )


def make_predict_step(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  mesh: jax.sharding.Mesh,
) -> Callable[..., Prediction]:
  """The jitted (variables, fusion, images) -> `Prediction`, images sharded."""
  replicated = sharding.replicated(mesh)
  batched = sharding.batched(mesh)
  return jax.jit(
    functools.partial(predict_step, model, config.eval),
    in_shardings=(replicated, replicated, batched),
    out_shardings=batched,
  )
