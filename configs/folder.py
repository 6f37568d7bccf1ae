"""Your own images: a directory or a glob of normal images is enough.

  python -m dmdd_jax.main --config configs/folder.py --workdir runs/parts \
    --config.data.normal=parts/good --config.data.defect=parts/bad \
    --config.data.masks=parts/masks

Without masks there are image metrics only. Without defective images there are
training and prediction (`--mode predict`) only. Images may have any size,
colour mode and format; all are resized to the square `data.image_size`. If they
show a texture such as leather, and no object, add
`--config.train.student.kind=adam`, as configs/mvtec.py does.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration; the caller sets data.normal."""
  config = default.get_config()
  config.data.name = 'folder'
  # Name of the row in the results and of the folder in the workdir.
  config.data.category = 'folder'
  return config
