"""The position bias: distances that normal images have at a position too.

Synopsis:

  state = position.learn_positions(predictor, state, training_images)
"""

import dataclasses

import numpy as np
from scipy import ndimage

from dmdd_jax import sharding
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import train_state

# The highest number of training images whose distances are averaged.
_POSITION_IMAGES = 128
# Smoothing of that mean in pixels: half the stride of the deepest features.
_POSITION_SIGMA = 8.0
# The bias is the mean above this quantile of all positions.
_POSITION_QUANTILE = 0.8


def learn_positions(
  predictor: predictor_lib.Predictor,
  state: train_state.TrainState,
  images: np.ndarray,
) -> train_state.TrainState:
  """The state with `dmdd.PositionBias` learned from training images.

  Args:
    predictor: the predictor of the state's model. It smooths the distances by
      `eval.smoothing_sigma`.
    state: the state of a model. Without `head.position_bias` it is returned
      unchanged.
    images: uint8 (N, S, S, 3), images or tiles of the model's input side,
      N >= 1. Of more than 128 images, 128 are drawn by `config.seed`.
  """
  if 'position' not in state.batch_stats:
    return state

  def with_bias(bias: np.ndarray) -> train_state.TrainState:
    bias = sharding.replicate(predictor.mesh, bias.astype(np.float32))
    stats = {**state.batch_stats, 'position': {'bias': bias}}
    return dataclasses.replace(state, batch_stats=stats)

  shape = state.batch_stats['position']['bias'].shape
  unknown = with_bias(np.zeros(shape))
  rng = np.random.default_rng(predictor.config.seed % 2**64)
  order = rng.permutation(len(images))
  chosen = np.sort(order[:_POSITION_IMAGES])
  prediction = predictor_lib.predict_images(
    predictor, unknown, score_lib.Fusion(), images[chosen]
  )
  mean = np.mean(prediction.distance, axis=0, dtype=np.float64)
  # Without smoothing, the texture of these images would be in the bias.
  mean = ndimage.gaussian_filter(mean, _POSITION_SIGMA)
  stride = mean.shape[0] // shape[0]
  mean = mean.reshape(shape[0], stride, shape[1], stride).mean(axis=(1, 3))
  usual = np.quantile(mean, _POSITION_QUANTILE)
  return with_bias(np.maximum(mean - usual, 0.0))
