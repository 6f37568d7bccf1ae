"""The demo: generated surfaces, no download, minutes on two cores.

The teacher's weights are random, so that the demo needs no network. Its figures
say that the program works, not how good the method is.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the demo's configuration."""
  config = default.get_config()
  config.data.generate = 'surface'
  config.data.root = 'runs/demo/data'
  config.data.category = 'surface'
  config.data.image_size = 128
  config.teacher.weights = 'random'
  config.student.trunk = 'encoder'
  # After so short a training the distances alone separate images too little.
  config.head.score_weight = 1.0
  config.train.batch_size = 8
  config.train.total_steps = 280
  config.train.distill_steps = 180
  config.train.log_every = 20
  config.train.checkpoint_every = 140
  return config
