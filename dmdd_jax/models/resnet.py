"""ResNet feature taps with torchvision's exact arithmetic.

One network serves as the frozen teacher and, from scratch, as the encoder of a
student. It ends at the last stage asked for: there is no classifier.

Synopsis:

  model = resnet.ResNet(arch='resnet18')
  variables = model.init(rng, jnp.zeros((1, 256, 256, 3)))
  layer1, layer2, layer3 = model.apply(variables, images)

The arithmetic follows torchvision: symmetric explicit padding for the strided
convolutions and the max-pooling (`'SAME'` pads asymmetrically), the stride of
a bottleneck on its 3x3 convolution, batch norm with epsilon 1e-5 and momentum
0.9 (torchvision's 0.1). In training, Flax keeps a running average of the biased
batch variance where torch keeps the unbiased one: n / (n - 1) apart, which the
frozen teacher never sees.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

# Mean and standard deviation of ImageNet's RGB pixels in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Spec:
  """Shape of one ResNet.

  Attributes:
    blocks: residual blocks of each of the four stages.
    bottleneck: whether the blocks are bottlenecks (ResNet-50 up).
    base_width: of a bottleneck's 3x3 convolution; 64 is ResNet-50's.
    channels: of the stem and of the first stage's blocks, doubled at each
      later stage. Tests use less than torchvision's 64.
  """

  blocks: tuple[int, int, int, int]
  bottleneck: bool
  base_width: int = 64
  channels: int = 64

  def stage_channels(self, stage: int) -> int:
    """`features` of the blocks of a stage, counted from 0."""
    return self.channels * 2**stage


SPECS = {
  'resnet18': Spec((2, 2, 2, 2), bottleneck=False),
  'resnet34': Spec((3, 4, 6, 3), bottleneck=False),
  'resnet50': Spec((3, 4, 6, 3), bottleneck=True),
  'wide_resnet50_2': Spec((3, 4, 6, 3), bottleneck=True, base_width=128),
}


def get_spec(arch: str) -> Spec:
  """Returns the shape of `arch`; ValueError naming the known ones."""
  if arch not in SPECS:
    raise ValueError(
      f'unknown ResNet architecture {arch!r}; choose one of {sorted(SPECS)}'
    )
  return SPECS[arch]


def normalize(images: jax.Array) -> jax.Array:
  """Maps RGB in [0, 1] (..., 3) to ImageNet's zero mean and unit variance."""
  mean = jnp.asarray(IMAGENET_MEAN, images.dtype)
  std = jnp.asarray(IMAGENET_STD, images.dtype)
  return (images - mean) / std


def conv(features: int, kernel: int, strides: int = 1, **kwargs) -> nn.Conv:
  """A bias-free convolution padded by `kernel // 2` on every side."""
  return nn.Conv(
    features,
    (kernel, kernel),
    (strides, strides),
    padding=kernel // 2,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    **kwargs,
  )


def batch_norm(train: bool, dtype: jnp.dtype, **kwargs) -> nn.BatchNorm:
  """Batch norm with torchvision's constants and float32 statistics."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    **kwargs,
  )


def max_pool(x: jax.Array, train: bool) -> jax.Array:
  """3x3 max-pooling of stride 2, padded by 1, of (B, H, W, C), H and W even.

  With `train` the same values by maxima of rows, then of columns: XLA's
  gradient of a pooling is a scatter, twenty times as slow on a CPU. Where
  maxima tie they share the gradient.
  """
  if not train:
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
  low = jnp.array(-jnp.inf, x.dtype)
  for axis in (1, 2):
    shape = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    even, odd = jnp.moveaxis(x.reshape(shape), axis + 1, 0)
    by_one = [(int(i == axis), -int(i == axis), 0) for i in range(4)]
    x = jnp.maximum(jnp.maximum(jax.lax.pad(odd, low, by_one), even), odd)
  return x


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

  features: int
  strides: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    norm = functools.partial(batch_norm, train, self.dtype)
    y = conv(self.features, 3, self.strides, dtype=self.dtype, name='conv1')(x)
    y = nn.relu(norm(name='bn1')(y))
    y = conv(self.features, 3, dtype=self.dtype, name='conv2')(y)
    y = norm(name='bn2')(y)
    if x.shape != y.shape:
      x = conv(
        self.features, 1, self.strides, dtype=self.dtype, name='downsample_0'
      )(x)
      x = norm(name='downsample_1')(x)
    return nn.relu(x + y)


class Bottleneck(nn.Module):
  """1x1, 3x3 (strided), 1x1 convolutions and a shortcut (ResNet-50 up)."""

  features: int
  strides: int = 1
  dtype: jnp.dtype = jnp.float32
  base_width: int = 64

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    norm = functools.partial(batch_norm, train, self.dtype)
    width = self.features * self.base_width // 64
    y = conv(width, 1, dtype=self.dtype, name='conv1')(x)
    y = nn.relu(norm(name='bn1')(y))
    y = conv(width, 3, self.strides, dtype=self.dtype, name='conv2')(y)
    y = nn.relu(norm(name='bn2')(y))
    y = conv(4 * self.features, 1, dtype=self.dtype, name='conv3')(y)
    y = norm(name='bn3')(y)
    if x.shape != y.shape:
      x = conv(
        4 * self.features,
        1,
        self.strides,
        dtype=self.dtype,
        name='downsample_0',
      )(x)
      x = norm(name='downsample_1')(x)
    return nn.relu(x + y)


def block_factory(
  arch: str, dtype: jnp.dtype, remat: bool = False
) -> Callable[..., nn.Module]:
  """The residual block of `arch`, to be called (features, strides, name=).

  With `remat` its activations are computed again for the gradient instead of
  being kept.
  """
  spec = get_spec(arch)
  block = Bottleneck if spec.bottleneck else BasicBlock
  options = {'base_width': spec.base_width} if spec.bottleneck else {}
  if remat:
    block = nn.remat(block, static_argnums=(2,))  # `train`
  return functools.partial(block, dtype=dtype, **options)


class ResNet(nn.Module):
  """The stem and the first `stages` stages of a torchvision ResNet.

  Attributes:
    arch: a key of `SPECS`.
    stages: how many of the four stages to run; one output each.
    dtype: of the computation; parameters and statistics stay float32.
    remat: see `block_factory`.
  """

  arch: str = 'resnet18'
  stages: int = 3
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> Sequence[jax.Array]:
    """Returns the post-ReLU outputs of the stages, strides 4, 8, 16, (32).

    Args:
      x: (B, H, W, 3), already normalised (see `normalize`).
      train: batch norm uses and updates the batch's statistics.

    Returns:
      A tuple of (B, ceil(H/s), ceil(W/s), C) arrays in `dtype`.
    """
    spec = get_spec(self.arch)
    block = block_factory(self.arch, self.dtype, self.remat)
    x = conv(spec.channels, 7, 2, dtype=self.dtype, name='conv1')(x)
    x = nn.relu(batch_norm(train, self.dtype, name='bn1')(x))
    x = max_pool(x, train)
    taps = []
    for stage in range(self.stages):
      for i in range(spec.blocks[stage]):
        strides = 2 if stage > 0 and i == 0 else 1
        name = f'layer{stage + 1}_{i}'
        x = block(spec.stage_channels(stage), strides, name=name)(x, train)
      taps.append(x)
    return tuple(taps)
