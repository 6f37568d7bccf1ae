"""Muon, whose Newton-Schulz iterations are taken on the small Gram matrix.

The same update as `optax.contrib.muon` (its state and its labels, too, so that
checkpoints of either go on with the other), for less than half the operations:
a kernel of 3 x 3 x 256 x 256 is a matrix M of 2304 x 256, and all that an
iteration does to it is to multiply it by a polynomial of M'M, 256 x 256. So the
polynomials are multiplied up among themselves, and M by their product once.
That is Gram Newton-Schulz (Dao-AILab); docs/performance.md has what it saves.

Synopsis:

  optimizer = muon.muon(0.02, optax.adamw(5e-3))
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Of https://kellerjordan.github.io/posts/muon: a x + b x^3 + c x^5, five times.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_BETA = 0.95
_EPSILON = 1e-8


def muon(
  learning_rate: optax.ScalarOrSchedule,
  others: optax.GradientTransformation,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """Kernels of convolutions by Muon with Nesterov's momentum of 0.95.

  Args:
    learning_rate: of the kernels, (h, w, in, out); each is taken as a matrix of
      h w in rows, as by Muon's author.
    others: the optimiser of everything else.
    weight_decay: of the kernels, times the learning rate.
  """
  kernels = optax.chain(
    scale_by_muon(),
    optax.stateless(lambda updates, _: jax.tree.map(_scaled, updates)),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  return optax.partition({'muon': kernels, 'adam': others}, _labels)


def scale_by_muon() -> optax.GradientTransformation:
  """Replaces the momentum of every kernel by `orthogonalize` of it."""

  def init(params: Any) -> optax.contrib.MuonState:
    return optax.contrib.MuonState(
      count=jnp.zeros([], jnp.int32),
      mu=optax.tree.zeros_like(params),
      ns_coeffs=jnp.asarray(COEFFICIENTS),  # Not read; optax's layout.
    )

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mean = optax.tree.update_moment(updates, state.mu, _BETA, 1)
    ahead = jax.tree.map(
      lambda m, g: _BETA * m + (1.0 - _BETA) * g,
      optax.tree.bias_correction(mean, _BETA, optax.safe_increment(count)),
      optax.tree.bias_correction(updates, _BETA, count),
    )
    state = state._replace(count=count, mu=mean)
    return jax.tree.map(orthogonalize, ahead), state

  return optax.GradientTransformation(init, update)


def orthogonalize(kernel: jax.Array) -> jax.Array:
  """Brings the singular values of a matrix near 1, to about 0.7 to 1.2.

  Those below about 1/500 of its Frobenius norm grow by 485 and stay smaller.

  Args:
    kernel: (..., out), float32, taken as a matrix with `out` columns.

  Returns:
    Likewise. Products are of full float32 precision: the iterations let the
    rounding of small eigenvalues grow by the square of 3.4 each.
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


def _factor(gram: jax.Array) -> jax.Array:
  """What an iteration multiplies the matrix by."""
  a, b, c = COEFFICIENTS
  return a * jnp.eye(len(gram)) + b * gram + c * _dot(gram, gram)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _scaled(update: jax.Array) -> jax.Array:
  """Wide matrices take longer steps, by the root of their aspect."""
  *rows, columns = update.shape
  return math.sqrt(max(1.0, columns / math.prod(rows))) * update


def _labels(params: Any) -> Any:
  return jax.tree.map(lambda x: 'muon' if x.ndim == 4 else 'adam', params)
