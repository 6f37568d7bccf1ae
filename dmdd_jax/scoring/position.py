"""The bias of a position: where a student is far from its teacher anyway.

Synopsis:

  state = position.learn_positions(predictor, state, training_images)
"""

import numpy as np
from scipy import ndimage

from dmdd_jax import sharding
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import train_state

# Training images whose distances are averaged, at most; the smoothing of that
# mean, in pixels: half the stride of the deepest features; and the share of
# positions that are usual: what the mean is above them in others is bias.
_POSITION_IMAGES = 128


_POSITION_SIGMA = 8.0


_POSITION_QUANTILE = 0.8


def learn_positions(
  predictor: predictor_lib.Predictor,
  state: train_state.TrainState,
  images: np.ndarray,
) -> train_state.TrainState:
  """The state with `dmdd.PositionBias` learned from training images.

  Args:
    predictor: of the state; its `eval.smoothing_sigma` is in the distances too.
    state: of a model with or without `head.position_bias`; of one without, it
      is returned as it is.
    images: uint8 (N, S, S, 3), images or tiles of the model's input side,
      N >= 1; with more than 128, that many of them, drawn by `config.seed`.
  """
  if 'position' not in state.batch_stats:
    return state

  def with_bias(bias: np.ndarray) -> train_state.TrainState:
    bias = sharding.replicate(predictor.mesh, bias.astype(np.float32))
    stats = {**state.batch_stats, 'position': {'bias': bias}}
    return state.replace(batch_stats=stats)

  shape = state.batch_stats['position']['bias'].shape
  unknown = with_bias(np.zeros(shape))
  rng = np.random.default_rng(predictor.config.seed % 2**64)
  order = rng.permutation(len(images))
  chosen = np.sort(order[:_POSITION_IMAGES])
  prediction = predictor_lib.predict_images(
    predictor, unknown, score_lib.Fusion(), images[chosen]
  )
  mean = np.mean(prediction.distance, axis=0, dtype=np.float64)
  # Smooth, or the texture of these very images would stay in it.
  mean = ndimage.gaussian_filter(mean, _POSITION_SIGMA)
  stride = mean.shape[0] // shape[0]
  mean = mean.reshape(shape[0], stride, shape[1], stride).mean(axis=(1, 3))
  usual = np.quantile(mean, _POSITION_QUANTILE)
  return with_bias(np.maximum(mean - usual, 0.0))
