"""The whole model: frozen teacher, decoupled student, segmentation head.

Synopsis:

  model = dmdd.from_config(config)
  variables = dmdd.init(model, rng, image_size=256)
  taps = model.apply(variables, images, method='teach')
  output = model.apply(variables, images)    # maps, logit, ...

`variables['params']` and `variables['batch_stats']` have the keys `teacher`,
`student` and (unless `head.kind` is 'none') `head`; the latter also has
`position` with `head.position_bias`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dmdd_jax.models import distance as distance_lib
from dmdd_jax.models import initial
from dmdd_jax.models import resnet
from dmdd_jax.models import segmentation
from dmdd_jax.models import student as student_lib

BRANCHES = ('normality', 'abnormality')
HEAD_INPUTS = ('maps', 'products')
FUSIONS = ('mean', 'root_mean_square')
DTYPES = ('float32', 'bfloat16')
MAX_BORDER = 3  # Of the 8 positions of the smallest images.

Features = Sequence[jax.Array]


@struct.dataclass
class Output:
  """What the model says of a batch of B images, at stride 4 (h, w).

  Attributes:
    maps: (B, h, w, 2 L) cosine distances, L normality levels then L
      abnormality levels, each in [0, 2]; L of the one branch where only one is
      trained. With `student.context` L counts those of both trunks, first
      those of the image, then those of its smaller copy.
    maps_mean: (B, h, w), their plain mean, the head's control.
    distance: (B, h, w), the mean of the normality levels and that of the
      abnormality levels, weighed by `normality_share` and the rest of 1, and
      with two trunks by `context_share` likewise, see `_combined`; less the
      bias of each position, see `PositionBias`, so that it can be negative.
    logit: (B, h, w), the head's anomaly logit; without a head, `distance`.
  """

  maps: jax.Array
  maps_mean: jax.Array
  distance: jax.Array
  logit: jax.Array


def distance_maps(
  branches: Sequence[Features], taps: Features, border: int = 0
) -> jax.Array:
  """Cosine-distance maps of each branch's L levels, in order, float32.

  All at the finest level's size, (B, h, w, L * len(branches)).

  The `border` outermost positions on each side take the value of the nearest
  one inside: next to the zeros that convolutions pad with, a student can stay
  far from its teacher on every image.
  """
  size = taps[0].shape[1:3]
  maps = [
    student_lib.resize_bilinear(
      distance_lib.cosine_distance(feature, tap)[..., None], size
    )
    for features in branches
    for feature, tap in zip(features, taps)
  ]
  distances = jnp.concatenate(maps, axis=-1)
  if not border:
    return distances
  for axis in (1, 2):  # By slices alone: those can be exported.
    inside = jax.lax.slice_in_dim(distances, border, -border, axis=axis)
    first, last = (
      jax.lax.slice_in_dim(inside, start, stop, axis=axis)
      for start, stop in ((0, 1), (-1, None))
    )
    distances = jnp.concatenate(
      [first] * border + [inside] + [last] * border, axis
    )
  return distances


def feature_products(branches: Sequence[Features], taps: Features) -> jax.Array:
  """Elementwise products of L2-normalised features (DeSTSeg's head input)."""

  def unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-12)

  size = taps[0].shape[1:3]
  products = [
    student_lib.resize_bilinear(unit(feature) * unit(tap), size)
    for features in branches
    for feature, tap in zip(features, taps)
  ]
  return jnp.concatenate(products, axis=-1)


class PositionBias(nn.Module):
  """Takes from (B, h, w) what is unusual of a position, 0 until it is known.

  A student stays farther from its teacher in some places of every image: in a
  corner that it never learns, or where the object is; with tiles, where in a
  tile. By how much is no batch's statistic, so it is not updated here:
  `scoring.position` does.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    bias = self.variable('batch_stats', 'bias', jnp.zeros, x.shape[1:])
    return x - bias.value


class DMDD(nn.Module):
  """Teacher, student and head under one variable tree.

  Attributes:
    arch: teacher architecture, a key of `resnet.SPECS`.
    student_options: further attributes of `student.Student`.
    head_kind: one of `segmentation.KINDS`.
    head_input: one of `HEAD_INPUTS`.
    head_options: further attributes of the head.
    border: see `distance_maps`.
    branches: those of `BRANCHES` that are trained; maps are of these alone.
    normality_share: see `Output.distance`; of one branch without meaning.
    context_share: likewise, of the second trunk's maps; without one unused.
    context_fusion: one of `FUSIONS`, how the two trunks' distances are put
      together.
    position_bias: whether `Output.distance` is less its `PositionBias`.
    dtype: of the computation; parameters, statistics, distances and logits
      are float32.
  """

  arch: str = 'resnet18'
  student_options: Mapping[str, Any] = struct.field(default_factory=dict)
  head_kind: str = 'multi_perception'
  head_input: str = 'maps'
  head_options: Mapping[str, Any] = struct.field(default_factory=dict)
  border: int = 0
  branches: Sequence[str] = BRANCHES
  normality_share: float = 0.5
  context_share: float = 0.5
  context_fusion: str = 'mean'
  position_bias: bool = False
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.teacher = resnet.ResNet(self.arch, dtype=self.dtype)
    self.student = student_lib.Student(
      self.arch, dtype=self.dtype, **self.student_options
    )
    if self.position_bias:
      self.position = PositionBias()
    if self.head_kind == 'multi_perception':
      self.head = segmentation.MultiPerceptionHead(
        dtype=self.dtype, **self.head_options
      )
    elif self.head_kind == 'destseg':
      options = {
        k: v for k, v in self.head_options.items() if 'attention' not in k
      }
      self.head = segmentation.DestsegHead(dtype=self.dtype, **options)

  def teach(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """The teacher's taps of images (B, H, W, 3) in [0, 1]; no gradient.

    `student.levels` of the images, then with `student.context` all three of
    their smaller copies.
    """
    x = resnet.normalize(images)
    levels = self.student_options.get('levels', 3)
    taps = self.teacher(x.astype(self.dtype), train=False)[:levels]
    if context := self.student_options.get('context', 0):
      x = student_lib.shrink(x, context).astype(self.dtype)
      taps += self.teacher(x, train=False)
    return jax.lax.stop_gradient(taps)

  def study(
    self, images: jax.Array, taps: Features, train: bool = False
  ) -> tuple[Features, Features]:
    """The student's (normality, abnormality) features of the same images."""
    x = resnet.normalize(images).astype(self.dtype)
    return self.student(x, taps, train)

  def segment(
    self,
    normality: Features,
    abnormality: Features,
    taps: Features,
    train: bool = False,
  ) -> Output:
    """Maps and logit from features; the head sends no gradient back."""
    outputs = dict(zip(BRANCHES, (normality, abnormality)))
    branches, taps = jax.lax.stop_gradient(
      ([outputs[name] for name in self.branches], taps)
    )
    maps = distance_maps(branches, taps, self.border)
    maps_mean = jnp.mean(maps, axis=-1)
    distance = maps_mean
    if len(branches) == 2 or self.student_options.get('context', 0):
      distance = self._combined(maps, len(branches))
    if self.position_bias:
      distance = self.position(distance)
    if self.head_kind == 'none':
      return Output(maps, maps_mean, distance, distance)
    inputs = maps
    if self.head_input == 'products':
      inputs = feature_products(branches, taps)
    logit = self.head(inputs.astype(self.dtype), train)
    return Output(maps, maps_mean, distance, logit[..., 0])

  def _combined(self, maps: jax.Array, branches: int) -> jax.Array:
    """`Output.distance` before the bias: (B, h, w, maps) -> (B, h, w).

    With `root_mean_square` what one trunk alone sees, a missing part that is
    all normal board to the local one, loses less than by a mean of both.
    """
    levels = maps.shape[-1] // branches
    shares = np.ones(1)
    if branches == 2:
      shares = np.array([self.normality_share, 1.0 - self.normality_share])
    if not self.student_options.get('context', 0):
      weights = np.float32(np.repeat(shares / levels, levels))
      return jnp.sum(maps * weights, axis=-1)
    total, first = jnp.float32(0.0), self.student_options.get('levels', 3)
    for branch, share in enumerate(shares):
      start = branch * levels
      local, context = (  # By slices alone: those can be exported.
        jnp.mean(jax.lax.slice_in_dim(maps, *ends, axis=-1), axis=-1)
        for ends in (
          (start, start + first),
          (start + first, start + levels),
        )
      )
      rest = 1.0 - self.context_share
      if self.context_fusion == 'mean':
        both = rest * local + self.context_share * context
      else:
        local, context = jnp.square(local), jnp.square(context)
        both = jnp.sqrt(rest * local + self.context_share * context)
      total += share * both
    return total

  def __call__(self, images: jax.Array, train: bool = False) -> Output:
    """Runs all three parts on images (B, H, W, 3) in [0, 1]."""
    taps = self.teach(images)
    normality, abnormality = self.study(images, taps, train)
    return self.segment(normality, abnormality, taps, train)


def from_config(config: ml_collections.ConfigDict) -> DMDD:
  """Builds the model of a config.

  Args:
    config: with every field; `config.check` is who refuses impossible ones.
  """
  head = config.head
  return DMDD(
    arch=config.teacher.arch,
    student_options=dict(config.student),
    head_kind=head.kind,
    head_input=head.input,
    head_options={
      'width': head.width,
      'dilations': tuple(head.dilations),
      'channel_attention': head.channel_attention,
      'spatial_attention': head.spatial_attention,
    },
    border=head.border,
    branches=_branches(config),
    normality_share=head.normality_share,
    context_share=head.context_share,
    context_fusion=head.context_fusion,
    position_bias=head.position_bias,
    dtype=jnp.dtype(config.dtype),
  )


def _branches(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Those that have maps: with a weight in `config.loss`, or all."""
  if config.head.untrained_maps:
    return BRANCHES
  weights = (config.loss.ngm_weight, config.loss.aim_weight)
  return tuple(name for name, weight in zip(BRANCHES, weights) if weight)


def init(model: DMDD, rng: jax.Array, image_size: int) -> dict[str, Any]:
  """Initialises all variables; `image_size` is a side in pixels, >= 32.

  They are NumPy's (see `initial`); under a transformation like `jax.jit` or
  `jax.eval_shape`, Flax's own of the same distributions.
  """
  images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
  if isinstance(rng, jax.core.Tracer):
    return model.init(rng, images)
  abstract = jax.eval_shape(model.init, rng, images)
  return initial.draw(abstract, np.asarray(jax.random.key_data(rng)).tolist())
