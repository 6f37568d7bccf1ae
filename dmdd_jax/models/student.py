"""The decoupled student: a trunk, then a normality and an abnormality branch.

The trunk turns an image (or, for `reverse`, the teacher's features of it) into
*initial features* with the shapes of the teacher's taps. `Decouple` expands
each with a 1x1 convolution and splits it into two features of equal capacity.

Trunks (`config.student.trunk`; sources in docs/method.md):

  encoder_decoder  ResNet from scratch with all four stages, then a decoder
  reverse          bottleneck and decoder over the teacher's own features
  encoder          ResNet from scratch, the teacher's own shape

With `config.student.context` a second trunk, always `reverse`, reproduces the
teacher's taps of a smaller copy of the image. It sees a whole object at once,
which a trunk with a small receptive field cannot, for a fraction of the cost.
"""

from collections.abc import Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from dmdd_jax.models import resnet

TRUNKS = ('encoder_decoder', 'reverse', 'encoder')
# How many times smaller the side of the second trunk's image may be; 0 is
# no second trunk.
CONTEXTS = (0, 2, 4)


def resize_bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes (B, H, W, C) to (B, *size, C), half-pixel centres."""
  shape = (x.shape[0], *size, x.shape[3])
  return jax.image.resize(x, shape, 'bilinear', antialias=False)


def shrink(x: jax.Array, factor: int) -> jax.Array:
  """Averages (B, H, W, C) over squares of `factor` pixels that tile it."""
  batch, height, width, channels = x.shape
  cells = (batch, height // factor, factor, width // factor, factor, channels)
  return jnp.mean(x.reshape(cells), axis=(2, 4))


class Decoder(nn.Module):
  """Stages of residual blocks from stride 32 back up to strides 16, 8, 4."""

  arch: str
  blocks_per_stage: int = 2
  dtype: jnp.dtype = jnp.float32
  first_stage: bool = True
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    sizes: Sequence[tuple[int, int]],
    train: bool = False,
  ) -> tuple[jax.Array, ...]:
    """Decodes (B, h, w, C4) to one array per size, given from fine to coarse.

    Args:
      x: the deepest features, half of `sizes[-1]` a side.
      sizes: (height, width) of layer1, layer2, layer3 of the teacher.
      train: batch norm uses and updates the batch's statistics.

    Returns:
      Features shaped as the teacher's taps, in the order of `sizes`.
    """
    spec = resnet.get_spec(self.arch)
    block = resnet.block_factory(self.arch, self.dtype, self.remat)
    if self.first_stage:
      for i in range(self.blocks_per_stage):
        x = block(spec.stage_channels(3), name=f'layer4_{i}')(x, train)
    outputs = []
    for stage in reversed(range(len(sizes))):
      x = resize_bilinear(x, sizes[stage])
      for i in range(self.blocks_per_stage):
        name = f'layer{stage + 1}_{i}'
        x = block(spec.stage_channels(stage), name=name)(x, train)
      outputs.append(x)
    return tuple(reversed(outputs))


class TapFusion(nn.Module):
  """RD4AD's multi-scale fusion of the teacher's taps into one embedding.

  Attributes:
    arch: of the teacher.
    width: `features` of its residual blocks; 0 is that of the fourth stage of
      `arch`, 512 for torchvision's.
    dtype: of the computation.
    remat: see `resnet.block_factory`.
  """

  arch: str
  width: int = 0
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, taps: Sequence[jax.Array], train: bool = False
  ) -> jax.Array:
    """Fuses taps of strides 4, 8, 16 into (B, H/32, W/32, C4)."""
    norm = functools.partial(resnet.batch_norm, train, self.dtype)
    channels = taps[-1].shape[-1]
    fused = []
    for level, x in enumerate(taps):
      for i in range(len(taps) - 1 - level):
        name = f'fuse{level + 1}_{i}'
        x = resnet.conv(channels, 3, 2, dtype=self.dtype, name=name)(x)
        x = nn.relu(norm(name=f'{name}_bn')(x))
      fused.append(x)
    x = jnp.concatenate(fused, axis=-1)
    block = resnet.block_factory(self.arch, self.dtype, self.remat)
    width = self.width or resnet.get_spec(self.arch).stage_channels(3)
    x = block(width, 2, name='layer4_0')(x, train)
    return block(width, name='layer4_1')(x, train)


class Decouple(nn.Module):
  """Splits one initial feature into a normality and an abnormality feature."""

  extra_convs: int = 0
  stop_abnormality_gradient: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """Maps (B, H, W, C) to two (B, H, W, C) arrays, both >= 0."""
    channels = x.shape[-1]
    pairs = []
    for name in ('normality', 'abnormality'):
      y = x
      if name == 'abnormality' and self.stop_abnormality_gradient:
        y = jax.lax.stop_gradient(y)
      for i in range(1 + self.extra_convs):
        y = resnet.conv(channels, 1, dtype=self.dtype, name=f'{name}_{i}')(y)
        norm = resnet.batch_norm(train, self.dtype, name=f'{name}_{i}_bn')
        y = nn.relu(norm(y))
      pairs.append(y)
    return pairs[0], pairs[1]


class Student(nn.Module):
  """Trunks and decoupling.

  Attributes:
    arch: of the teacher, whose tap shapes the student reproduces.
    trunk: one of `TRUNKS`.
    extra_convs: further 1x1 convolutions per branch.
    stop_abnormality_gradient: the abnormality branch does not train the trunk.
    dtype: of the computation.
    remat: the residual blocks' activations are computed again for the gradient.
    levels: how many of the teacher's levels the trunk reproduces, from the
      finest on, 1 to 3. A second trunk reproduces all three.
    context: one of `CONTEXTS`; if not 0, the taps after the first `levels` are
      the teacher's of a copy of the image with its side divided by this.
    context_width: `TapFusion.width` of the second trunk.
  """

  arch: str = 'resnet18'
  trunk: str = 'encoder_decoder'
  extra_convs: int = 0
  stop_abnormality_gradient: bool = False
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  levels: int = 3
  context: int = 0
  context_width: int = 512

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    taps: Sequence[jax.Array],
    train: bool = False,
  ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Returns the normality and the abnormality features of a batch.

    Args:
      images: (B, H, W, 3), normalised.
      taps: the teacher's features of the same images; their shapes are the
        outputs' shapes, their values are used by `reverse` trunks only. With
        `context` those of the image, then those of its smaller copy.
      train: batch norm uses and updates the batch's statistics.

    Returns:
      (normality, abnormality), each a tuple of arrays shaped like `taps`.

    Raises:
      ValueError: unknown trunk.
    """
    options = {'dtype': self.dtype, 'remat': self.remat}

    def reverse(taps: Sequence[jax.Array], width: int = 0, prefix: str = ''):
      embedding = TapFusion(
        self.arch, width, name=f'{prefix}bottleneck', **options
      )(jax.lax.stop_gradient(taps), train)
      decoder = Decoder(
        self.arch, first_stage=False, name=f'{prefix}decoder', **options
      )
      return decoder(embedding, [tap.shape[1:3] for tap in taps], train)

    taps, context_taps = taps[: self.levels], taps[self.levels :]
    if self.trunk == 'encoder_decoder':
      encoder = resnet.ResNet(self.arch, 4, name='encoder', **options)
      deepest = encoder(images, train)[-1]
      decoder = Decoder(self.arch, name='decoder', **options)
      features = decoder(deepest, [tap.shape[1:3] for tap in taps], train)
    elif self.trunk == 'reverse':
      features = reverse(taps)
    elif self.trunk == 'encoder':
      encoder = resnet.ResNet(self.arch, self.levels, name='encoder', **options)
      features = encoder(images, train)
    else:
      raise ValueError(
        f'unknown student.trunk {self.trunk!r}; choose one of {TRUNKS}'
      )
    if self.context:
      features += reverse(context_taps, self.context_width, 'context_')
    normality, abnormality = [], []
    for level, feature in enumerate(features):
      split = Decouple(
        self.extra_convs,
        self.stop_abnormality_gradient,
        self.dtype,
        name=f'decouple{level + 1}',
      )
      normal, abnormal = split(feature, train)
      normality.append(normal)
      abnormality.append(abnormal)
    return tuple(normality), tuple(abnormality)
