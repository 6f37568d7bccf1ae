"""MVTec AD with a budget for two CPU cores: about half an hour a category.

`configs/mvtec_cpu.py:screw`, a comma list, or all 15.
"""

import ml_collections

from configs import mvtec


def get_config(categories: str = '') -> ml_collections.ConfigDict:
  """Returns the configuration of some categories; '' means all 15."""
  config = mvtec.get_config(categories)
  config.train.batch_size = 8
  config.train.total_steps = 750
  config.train.distill_steps = 500
  config.train.checkpoint_every = 250
  return config
