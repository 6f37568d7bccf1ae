"""From the model's distances to a fused map and an image score.

Whole images and tiled ones are scored by the same `score`: a whole image in
the program that runs the model, a tiled one after its tiles are joined.

Synopsis:

  raw = score.measure(model, variables, images)
  prediction = score.score(config.eval, fusion, raw)
  predict = score.make_predict_step(config, model, mesh)  # Both, jitted.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, cast

from flax import struct
import jax
import jax.numpy as jnp
import ml_collections

from dmdd_jax import sharding
from dmdd_jax.models import dmdd
from dmdd_jax.models import student as student_lib


@struct.dataclass
class Raw:
  """The model's measurements of B images of side S, all float32.

  Attributes:
    probability: (B, S, S) the head's probability of a defect, in [0, 1].
    distance: (B, S, S) weighted mean of the distance maps minus the
      `dmdd.PositionBias`, at most 2; negative where the bias is higher.
    maps_mean: (B, S, S) plain mean of the distance maps, in [0, 2].
  """

  probability: jax.Array
  distance: jax.Array
  maps_mean: jax.Array


@struct.dataclass
class Prediction:
  """The anomaly maps and scores of B images of side S, all float32.

  Attributes:
    map: (B, S, S) anomaly map, higher is more anomalous (see `Fusion`).
    image_score: (B,) mean of the highest pixels of `Fusion.score_map`. That is
      not `map`: the head has a lower weight in it.
    maps_mean: (B, S, S) mean of the distance maps, in [0, 2], smoothed; the
      control.
    maps_mean_score: (B,) mean of the highest pixels of `maps_mean`.
    distance: (B, S, S) `Raw.distance`, smoothed; an input of the fusion.
    probability: (B, S, S) `Raw.probability`, smoothed; an input of the fusion.
  """

  map: jax.Array
  image_score: jax.Array
  maps_mean: jax.Array
  maps_mean_score: jax.Array
  distance: jax.Array
  probability: jax.Array


@struct.dataclass
class Fusion:
  """Fuses probability and distance to one map, in units of normal pixels.

  map = head_weight * (probability - head_center) / head_scale
        + maps_weight * (distance - maps_center) / maps_scale

  Centres and scales come from held-out normal images (see
  scoring/calibration.py). The head's probability, unlike its logit, can only
  add to the distances: a head trained on synthetic anomalies cannot hide a
  defect of an unknown kind. Without a head, `head_weight` is 0.

  The image score uses `score_head_weight` in the place of `head_weight`: the
  head outlines defects best, but it can have a high probability on normal spots
  with low distances.
  """

  head_center: jax.typing.ArrayLike = 0.0
  head_scale: jax.typing.ArrayLike = 1.0
  maps_center: jax.typing.ArrayLike = 0.0
  maps_scale: jax.typing.ArrayLike = 1.0
  head_weight: jax.typing.ArrayLike = 1.0
  maps_weight: jax.typing.ArrayLike = 0.0
  # The default is the behaviour of older checkpoints, without this field.
  score_head_weight: jax.typing.ArrayLike = 1.0

  def __call__(self, probability: jax.Array, distance: jax.Array) -> jax.Array:
    """Fuses two arrays of one shape, of numpy or jax, to one of that shape."""
    head: Any = (probability - self.head_center) / self.head_scale
    maps: Any = (distance - self.maps_center) / self.maps_scale
    return self.head_weight * head + self.maps_weight * maps

  def score_map(self, probability: jax.Array, distance: jax.Array) -> jax.Array:
    """The map whose highest pixels give the image score; same shapes."""
    fusion = dataclasses.replace(self, head_weight=self.score_head_weight)
    return fusion(probability, distance)


def image_score(maps: jax.Array, top_pixels: int) -> jax.Array:
  """Mean of the `top_pixels` highest values of each map: (B, ...) -> (B,)."""
  flat = maps.reshape(maps.shape[0], -1)
  top, _ = jax.lax.top_k(flat, min(top_pixels, flat.shape[1]))
  return jnp.mean(top, axis=-1)


def smooth(maps: jax.Array, sigma: float) -> jax.Array:
  """Gaussian smoothing of maps (B, H, W), mirrored at the border.

  Args:
    maps: float32.
    sigma: standard deviation of the kernel in pixels; 0 returns the maps
      unchanged. The kernel ends at four sigma.
  """
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


def measure(
  model: dmdd.DMDD, variables: Mapping[str, Any], images: jax.Array
) -> Raw:
  """Runs the model on RGB images (B, S, S, 3), float32 in [0, 1] or uint8."""
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255.0
  output = cast(dmdd.Output, model.apply(variables, images))
  probability = jax.nn.sigmoid(output.logit)
  maps = jnp.stack([probability, output.distance, output.maps_mean], axis=-1)
  maps = student_lib.resize_bilinear(maps, (images.shape[1], images.shape[2]))
  return Raw(maps[..., 0], maps[..., 1], maps[..., 2])


def score(
  options: ml_collections.ConfigDict, fusion: Fusion, raw: Raw
) -> Prediction:
  """Smooths, fuses and scores the measurements of whole images.

  Args:
    options: `config.eval`; `score_top_pixels` and `smoothing_sigma` are read.
    fusion: the weights from the calibration.
    raw: measurements of whole images; tiles have to be joined before.
  """
  # Before the fusion: the calibration has the same smoothed inputs.
  raw = jax.tree.map(lambda maps: smooth(maps, options.smoothing_sigma), raw)
  score_map = fusion.score_map(raw.probability, raw.distance)
  top = options.score_top_pixels
  return Prediction(
    map=fusion(raw.probability, raw.distance),
    image_score=image_score(score_map, top),
    maps_mean=raw.maps_mean,
    maps_mean_score=image_score(raw.maps_mean, top),
    distance=raw.distance,
    probability=raw.probability,
  )


def predict_step(
  model: dmdd.DMDD,
  options: ml_collections.ConfigDict,
  variables: Mapping[str, Any],
  fusion: Fusion,
  images: jax.Array,
) -> Prediction:
  """`measure`, then `score`, for whole images (B, S, S, 3)."""
  return score(options, fusion, measure(model, variables, images))


def make_predict_step(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  mesh: jax.sharding.Mesh,
) -> Callable[..., Prediction]:
  """The jitted (variables, fusion, images) -> `Prediction`, images sharded."""
  replicated = sharding.replicated(mesh)
  batched = sharding.batched(mesh)
  # Each device for its own rows: jit's partitioner would gather all maps on
  # each device to look for the highest pixels.
  predict = jax.shard_map(
    functools.partial(predict_step, model, config.eval),
    mesh=mesh,
    in_specs=(replicated.spec, replicated.spec, batched.spec),
    out_specs=batched.spec,
  )
  return jax.jit(
    predict,
    in_shardings=(replicated, replicated, batched),
    out_shardings=batched,
  )


def make_measure_step(
  model: dmdd.DMDD, mesh: jax.sharding.Mesh
) -> Callable[..., Raw]:
  """The jitted (variables, images) -> `Raw`, images sharded; for tiles."""
  batched = sharding.batched(mesh)
  return jax.jit(
    functools.partial(measure, model),
    in_shardings=(sharding.replicated(mesh), batched),
    out_shardings=batched,
  )


def make_score_step(
  options: ml_collections.ConfigDict,
) -> Callable[[Fusion, Raw], Prediction]:
  """The jitted `score` on the host's processor, for joined tiles.

  It runs on the host so that the memory of an accelerator does not grow with
  the image.
  """
  function = jax.jit(functools.partial(score, options))
  host = jax.local_devices(backend='cpu')[0]

  def run(fusion: Fusion, raw: Raw) -> Prediction:
    return function(*jax.device_put((fusion, raw), host))

  return run
