"""Your own images: a directory or a glob of normal ones is enough.

  python -m dmdd_jax.main --config configs/folder.py --workdir runs/parts \
    --config.data.normal=parts/good --config.data.defect=parts/bad \
    --config.data.masks=parts/masks

Without masks there are image metrics only; without defective images there is
training, and prediction (`--mode predict`). Any size, colour mode and format
of image will do; all are resized to the square `data.image_size`. If they show
a texture and no object, as leather, add `--config.train.student.kind=adam`, as
configs/mvtec.py has it.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration; data.normal is left to be set."""
  config = default.get_config()
  config.data.name = 'folder'
  # Name of the results' row and of the folder in the workdir.
  config.data.category = 'folder'
  return config
