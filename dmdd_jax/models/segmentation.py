"""Segmentation heads: distance maps in, one anomaly logit per position out.

  multi_perception  parallel dilated convolutions and a global pooling (the
                    "perceptions"), then channel and spatial attention
  destseg           DeSTSeg's head as a control: two residual blocks, then an
                    ASPP whose five branches are concatenated and projected

`config.head.kind = 'none'` uses no head at all: the maps alone.
"""

from collections.abc import Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from dmdd_jax.models import resnet

KINDS = ('multi_perception', 'destseg', 'none')


class ConvNormAct(nn.Module):
  """Convolution (dilated, zero-padded to keep the size), batch norm, ReLU."""

  features: int
  kernel: int = 3
  dilation: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(
      self.features,
      (self.kernel, self.kernel),
      kernel_dilation=self.dilation,
      padding=self.dilation * (self.kernel // 2),
      use_bias=False,
      dtype=self.dtype,
      name='conv',
    )(x)
    return nn.relu(resnet.batch_norm(train, self.dtype, name='bn')(x))


class ChannelAttention(nn.Module):
  """CBAM's channel gate from average- and max-pooled features."""

  reduction: int = 4
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = max(1, x.shape[-1] // self.reduction)
    squeeze = nn.Dense(hidden, dtype=self.dtype, name='squeeze')
    excite = nn.Dense(x.shape[-1], dtype=self.dtype, name='excite')
    gate = sum(
      excite(nn.relu(squeeze(pool(x, axis=(1, 2)))))
      for pool in (jnp.mean, jnp.max)
    )
    return x * nn.sigmoid(gate)[:, None, None, :]


class SpatialAttention(nn.Module):
  """CBAM's spatial gate from channel-wise average and maximum."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    pooled = jnp.stack([jnp.mean(x, axis=-1), jnp.max(x, axis=-1)], axis=-1)
    gate = nn.Conv(1, (7, 7), padding=3, dtype=self.dtype, name='conv')(pooled)
    return x * nn.sigmoid(gate)


class Perceptions(nn.Module):
  """Parallel dilated convolutions and a broadcast global average."""

  features: int
  dilations: Sequence[int]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (B, H, W, C) to (B, H, W, features * (len(dilations) + 1))."""
    branch = functools.partial(ConvNormAct, self.features, dtype=self.dtype)
    views = [
      branch(
        kernel=1 if dilation == 1 else 3,
        dilation=dilation,
        name=f'dilated{dilation}',
      )(x, train)
      for dilation in self.dilations
    ]
    pooled = jnp.mean(x, axis=(1, 2), keepdims=True)
    pooled = nn.relu(
      nn.Dense(self.features, dtype=self.dtype, name='global')(pooled)
    )
    views.append(jnp.broadcast_to(pooled, views[0].shape))
    return jnp.concatenate(views, axis=-1)


class MultiPerceptionHead(nn.Module):
  """Fuses the maps with several perceptions and two attentions.

  Attributes:
    width: channels of each perception.
    dilations: of the parallel convolutions (1 means a 1x1 convolution).
    channel_attention: gate channels by their global statistics.
    spatial_attention: gate positions by their channel statistics.
    dtype: of the computation; the logits are float32.
  """

  width: int = 32
  dilations: Sequence[int] = (1, 6, 12, 18)
  channel_attention: bool = True
  spatial_attention: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (B, h, w, C) to logits (B, h, w, 1), float32."""
    x = ConvNormAct(self.width, dtype=self.dtype, name='stem')(x, train)
    x = Perceptions(
      self.width, tuple(self.dilations), self.dtype, name='perceptions'
    )(x, train)
    if self.channel_attention:
      x = ChannelAttention(dtype=self.dtype, name='channel_attention')(x)
    if self.spatial_attention:
      x = SpatialAttention(dtype=self.dtype, name='spatial_attention')(x)
    x = ConvNormAct(self.width, dtype=self.dtype, name='fuse')(x, train)
    return nn.Conv(1, (1, 1), dtype=jnp.float32, name='logit')(
      x.astype(jnp.float32)
    )


class DestsegHead(nn.Module):
  """DeSTSeg's segmentation network, without attention, as the control."""

  width: int = 32
  dilations: Sequence[int] = (1, 6, 12, 18)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (B, h, w, C) to logits (B, h, w, 1), float32."""
    for i in range(2):
      x = resnet.BasicBlock(self.width, dtype=self.dtype, name=f'res_{i}')(
        x, train
      )
    x = Perceptions(self.width, tuple(self.dilations), self.dtype, name='aspp')(
      x, train
    )
    x = ConvNormAct(self.width, kernel=1, dtype=self.dtype, name='project')(
      x, train
    )
    x = ConvNormAct(self.width, dtype=self.dtype, name='fuse')(x, train)
    return nn.Conv(1, (1, 1), dtype=jnp.float32, name='logit')(
      x.astype(jnp.float32)
    )
