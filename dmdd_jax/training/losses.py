"""Losses of DMDD as pure functions of arrays.

Features are (B, H, W, C), masks (B, H, W, 1) in [0, 1] with 1 = anomalous,
logits (B, H, W, 1). Every function computes in float32 and returns a float32
scalar unless it says otherwise. NGM and AIM are named by the paper (arXiv
2408.03888); their formulas here are this project's reconstruction, see
docs/method.md.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmdd_jax import config as config_lib
from dmdd_jax.models import distance as distance_lib


def flat_cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """1 - cos of each example's whole feature map: -> (B,) (RD4AD's form)."""
  batch = a.shape[0]
  return distance_lib.cosine_distance(
    a.reshape(batch, 1, 1, -1), b.reshape(batch, 1, 1, -1)
  )[:, 0, 0]


def resize_mask(mask: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes (B, H, W, 1) to (B, *size, 1), values in [0, 1], area-averaged.

  The soft mask keeps regions smaller than a feature cell, which thresholding
  an antialiased mask at 0.5 loses (23 % of the masks at stride 16). Where the
  size does not divide, a pixel counts in each cell by the share it covers.
  """
  height, width = mask.shape[1:3]
  if height % size[0] == 0 and width % size[1] == 0:
    cells = mask.reshape(
      mask.shape[0], size[0], height // size[0], size[1], width // size[1], 1
    )
    return jnp.mean(cells, axis=(2, 4))
  return jnp.einsum(
    'oh,bhwc,pw->bopc',
    _cell_shares(height, size[0]),
    mask,
    _cell_shares(width, size[1]),
    precision=jax.lax.Precision.HIGHEST,
  )


def _cell_shares(pixels: int, cells: int) -> np.ndarray:
  """(cells, pixels): what share of each cell each pixel covers."""
  side = pixels / cells
  start, pixel = side * np.arange(cells)[:, None], np.arange(pixels)
  overlap = np.minimum(start + side, pixel + 1) - np.maximum(start, pixel)
  return np.float32(np.maximum(overlap, 0.0) / side)


def focused_mean(
  distance: jax.Array, focus: float, weight: jax.Array | None = None
) -> jax.Array:
  """Mean in which a position counts by its own distance to the power `focus`.

  Most positions of an image are soon learned, and a plain mean of them hides
  the few that are not, by which an image is scored. No gradient goes through
  the weights, and their scale does not matter: the loss keeps the unit of the
  distances.

  Args:
    distance: of any shape, >= 0.
    focus: 0 is the plain mean; the larger, the more the worst count.
    weight: of the same shape, in [0, 1], multiplies the positions' weights; if
      all of them are 0 the mean is 0. With a focus of 0 their sum is taken as
      at least 1.
  """
  if focus:
    own = jax.lax.stop_gradient(jnp.maximum(distance, 1e-6)) ** focus
    weight = own if weight is None else own * weight
  if weight is None:
    return jnp.mean(distance)
  least = jnp.float32(1e-12 if focus else 1.0)
  return jnp.sum(distance * weight) / jnp.maximum(jnp.sum(weight), least)


def ngm(
  normality: Sequence[jax.Array],
  teacher_normal: Sequence[jax.Array],
  masks: Sequence[jax.Array] | None = None,
  flat: bool = False,
  focus: float = 0.0,
) -> jax.Array:
  """Normality guidance: N_l(x_a) is fitted to T_l(x_n), summed over levels.

  Args:
    normality: the student's normality features of x_a, one per level.
    teacher_normal: the teacher's features of x_n.
    masks: with masks at the levels' sizes, only normal positions count.
    flat: one cosine per example over the whole map instead of per position.
    focus: see `focused_mean`; of positions, with `flat` of examples.

  Raises:
    ValueError: `flat` together with `masks`.
  """
  if flat and masks is not None:
    raise ValueError('ngm: a flat cosine has no positions to mask')
  total = jnp.float32(0.0)
  for level, (student, teacher) in enumerate(zip(normality, teacher_normal)):
    metric = flat_cosine_distance if flat else distance_lib.cosine_distance
    weight = None if masks is None else 1.0 - masks[level][..., 0]
    total += focused_mean(metric(student, teacher), focus, weight)
  return total


def aim(
  abnormality: Sequence[jax.Array],
  teacher: Sequence[jax.Array],
  masks: Sequence[jax.Array],
  kind: str = 'match_mask',
  margin: float = 1.0,
  focus: float = 0.0,
) -> jax.Array:
  """Abnormality inverse mimicking: A_l leaves T_l inside the anomaly.

  Args:
    abnormality: the student's abnormality features of x_a, one per level.
    teacher: the teacher's features (of x_a by default, of x_n by config).
    masks: (B, h, w, 1) at each level's size, soft values allowed.
    kind: 'match_mask', mean |D - M|: distance 0 in normal positions and 1 in
      anomalous ones; or 'margin', mean over anomalous positions alone of
      max(0, margin - D).
    margin: for 'margin'.
    focus: for 'match_mask', see `focused_mean`; of |D - M|.

  Raises:
    ValueError: unknown kind.
  """
  if kind not in config_lib.AIM_KINDS:
    raise ValueError(
      f'unknown loss.aim {kind!r}; choose one of {config_lib.AIM_KINDS}'
    )
  total = jnp.float32(0.0)
  for student, target, mask in zip(abnormality, teacher, masks):
    distance, mask = distance_lib.cosine_distance(student, target), mask[..., 0]
    if kind == 'match_mask':
      total += focused_mean(jnp.abs(distance - mask), focus)
    else:
      hinge = jnp.maximum(0.0, margin - distance)
      total += focused_mean(hinge, 0.0, mask)
  return total


def focal(
  logits: jax.Array, mask: jax.Array, gamma: float, alpha: float | None = None
) -> jax.Array:
  """Mean binary focal loss (arXiv 1708.02002); `alpha` weighs class 1."""
  loss = optax.sigmoid_focal_loss(logits, mask, alpha=alpha, gamma=gamma)
  return jnp.mean(loss)


def dice(logits: jax.Array, mask: jax.Array, epsilon: float = 1.0) -> jax.Array:
  """1 - Dice over the batch's positions, smoothed by `epsilon` pixels."""
  probability = jax.nn.sigmoid(logits)
  overlap = 2.0 * jnp.sum(probability * mask) + epsilon
  return 1.0 - overlap / (jnp.sum(probability) + jnp.sum(mask) + epsilon)


def segmentation(
  logits: jax.Array, mask: jax.Array, kind: str = 'focal_l1'
) -> jax.Array:
  """The head's loss: 'focal_l1' (gamma 4) or 'focal_dice' (gamma 2, .25).

  Args:
    logits: (B, h, w, 1).
    mask: (B, h, w, 1) in [0, 1].
    kind: one of `config.SEGMENTATION_LOSSES`.

  Raises:
    ValueError: unknown kind.
  """
  logits = logits.astype(jnp.float32)
  if kind == 'focal_l1':
    l1 = jnp.mean(jnp.abs(jax.nn.sigmoid(logits) - mask))
    return focal(logits, mask, gamma=4.0) + l1
  if kind == 'focal_dice':
    return focal(logits, mask, gamma=2.0, alpha=0.25) + dice(logits, mask)
  raise ValueError(
    f'unknown loss.segmentation {kind!r}; choose one of'
    f' {config_lib.SEGMENTATION_LOSSES}'
  )
