"""Muon, whose Newton-Schulz iterations are taken on the small Gram matrix.

The update is that of `optax.contrib.muon`, with less than half the operations.
A kernel of 3 x 3 x 256 x 256 is a matrix M of 2304 x 256. Each iteration
multiplies it by a polynomial of M'M, which is only 256 x 256. So the
polynomials are multiplied with each other first, and M is multiplied once by
their product. This is Gram Newton-Schulz (Dao-AILab); docs/performance.md has
the time saved.

Over several devices, each kernel is iterated on one of them, and the results
are added up. Gradients, momentum and parameters are on every device.

The state has the keys of optax's, so checkpoints of either load with the other.

Synopsis:

  optimizer = muon.muon(0.02, optax.adamw(5e-3), mesh=mesh)
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dmdd_jax import sharding

# Of https://kellerjordan.github.io/posts/muon: a x + b x^3 + c x^5, five times.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_BETA = 0.95
_EPSILON = 1e-8


class State(NamedTuple):
  """The state of `scale_by_muon`.

  The names are keys of checkpoints and must not change.

  Attributes:
    count: () int32, number of updates.
    mu: the momentum, a tree like that of the parameters.
    ns_coeffs: (3,) float32 `COEFFICIENTS`. It is not read; checkpoints have it.
  """

  count: jax.Array
  mu: optax.Updates
  ns_coeffs: jax.Array


def muon(
  learning_rate: optax.ScalarOrSchedule,
  others: optax.GradientTransformation,
  weight_decay: float = 0.0,
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformation:
  """Muon with Nesterov's momentum of 0.95 for the kernels of convolutions.

  Args:
    learning_rate: the rate of the kernels (h, w, in, out). A kernel is taken as
      a matrix of h * w * in rows, as by Muon's author.
    others: the optimiser of all other parameters.
    weight_decay: weight decay of the kernels, times the learning rate.
    mesh: the devices that share the iterations; None iterates all kernels on
      each.
  """
  kernels = optax.chain(
    scale_by_muon(mesh),
    optax.stateless(lambda updates, _: jax.tree.map(_scaled, updates)),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  return optax.partition({'muon': kernels, 'adam': others}, _labels)


def scale_by_muon(
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformation:
  """Replaces the momentum of every kernel by `orthogonalize` of it."""

  def init(params: optax.Params) -> State:
    return State(
      count=jnp.zeros([], jnp.int32),
      mu=optax.tree.zeros_like(params),
      ns_coeffs=jnp.asarray(COEFFICIENTS),
    )

  def update(
    updates: optax.Updates, state: State, params: optax.Params | None = None
  ) -> tuple[optax.Updates, State]:
    del params
    count = optax.safe_increment(state.count)
    mean = optax.tree.update_moment(updates, state.mu, _BETA, 1)
    ahead = jax.tree.map(
      lambda m, g: _BETA * m + (1.0 - _BETA) * g,
      optax.tree.bias_correction(mean, _BETA, optax.safe_increment(count)),
      optax.tree.bias_correction(updates, _BETA, count),
    )
    state = state._replace(count=count, mu=mean)
    if mesh is None or mesh.size == 1:
      return jax.tree.map(orthogonalize, ahead), state
    leaves, structure = jax.tree.flatten(ahead)
    leaves = _orthogonalize_over(mesh, leaves)
    return jax.tree.unflatten(structure, leaves), state

  return optax.GradientTransformation(init, update)


def orthogonalize(kernel: jax.Array) -> jax.Array:
  """Brings the singular values of a matrix near 1, to about 0.7 to 1.2.

  Values below about 1/500 of its Frobenius norm grow by a factor of 485 and
  stay smaller.

  Args:
    kernel: (..., out), float32, taken as a matrix with `out` columns.

  Returns:
    A kernel of the same shape. Products have full float32 precision: each
    iteration multiplies the rounding errors of small eigenvalues by 3.4^2.
  """
  matrix = kernel.reshape(-1, kernel.shape[-1])
  matrix /= jnp.linalg.norm(matrix) + _EPSILON
  tall = matrix.shape[0] > matrix.shape[1]
  gram = _dot(matrix.T, matrix) if tall else _dot(matrix, matrix.T)
  product = factor = _factor(gram)
  for _ in range(ITERATIONS - 1):
    gram = _dot(_dot(factor, gram), factor)
    factor = _factor(gram)
    product = _dot(factor, product)
  result = _dot(matrix, product) if tall else _dot(product, matrix)
  return result.reshape(kernel.shape)


def assign(shapes: Sequence[tuple[int, ...]], devices: int) -> list[list[int]]:
  """Which kernels each device iterates, so that all work about as long.

  The costliest kernel first, each to the device with the least work so far: no
  device works longer than the mean and one kernel more.

  Returns:
    For each device the indices of its kernels in `shapes`.
  """
  owned: list[list[int]] = [[] for _ in range(devices)]
  work = [0] * devices
  for i in sorted(range(len(shapes)), key=lambda i: -operations(shapes[i])):
    device = work.index(min(work))
    owned[device].append(i)
    work[device] += operations(shapes[i])
  return owned


def operations(shape: tuple[int, ...]) -> int:
  """Floating-point operations of `orthogonalize` of a kernel."""
  small, large = sorted((math.prod(shape[:-1]), shape[-1]))
  return 4 * small**2 * large + (8 * ITERATIONS - 6) * small**3


def _orthogonalize_over(
  mesh: jax.sharding.Mesh, kernels: list[jax.Array]
) -> list[jax.Array]:
  """`orthogonalize` of each kernel on one device of the mesh, for all.

  The devices' results are added, zeros where another device iterates. To gather
  them would send less over two to eight devices, but over 32 three times as
  much: a device with one large kernel sets the size of every device's part.
  """
  owned = assign([kernel.shape for kernel in kernels], mesh.size)

  def iterate(own: list[int]):
    return lambda kernels: [
      orthogonalize(kernel) if i in own else jnp.zeros_like(kernel)
      for i, kernel in enumerate(kernels)
    ]

  def share(kernels: list[jax.Array]) -> list[jax.Array]:
    device = jax.lax.axis_index(sharding.DATA_AXIS)
    mine = jax.lax.switch(device, [iterate(own) for own in owned], kernels)
    return jax.lax.psum(mine, sharding.DATA_AXIS)

  everywhere = jax.sharding.PartitionSpec()
  return jax.shard_map(
    share, mesh=mesh, in_specs=everywhere, out_specs=everywhere
  )(kernels)


def _factor(gram: jax.Array) -> jax.Array:
  """The polynomial (n, n) by which an iteration multiplies the matrix."""
  a, b, c = COEFFICIENTS
  return a * jnp.eye(len(gram)) + b * gram + c * _dot(gram, gram)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """The matrix product in full float32 precision."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _scaled(update: jax.Array) -> jax.Array:
  """Scales the steps of wide matrices by the root of their aspect ratio."""
  *rows, columns = update.shape
  return math.sqrt(max(1.0, columns / math.prod(rows))) * update


def _labels(params: Any) -> Any:
  """The optimiser of each parameter: a tree of 'muon' and 'adam'."""
  return jax.tree.map(lambda x: 'muon' if x.ndim == 4 else 'adam', params)
