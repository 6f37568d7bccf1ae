"""How far apart two features are; the losses and the maps measure alike."""

import jax
import jax.numpy as jnp


def cosine_distance(
  a: jax.Array, b: jax.Array, epsilon: float = 1e-6
) -> jax.Array:
  """1 - cos of the channel vectors: (B, H, W, C) twice -> (B, H, W), [0, 2].

  Two zero vectors are at distance 1. The norm is smoothed by `epsilon` so that
  the gradient at a zero vector (a ReLU's output) is finite.
  """
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  dot = jnp.sum(a * b, axis=-1)
  square = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
  return 1.0 - dot * jax.lax.rsqrt(square + epsilon**2)
