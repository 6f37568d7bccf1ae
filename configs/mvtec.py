"""MVTec AD, ImageNet teacher: `configs/mvtec.py:screw`, a comma list, or all.

The table holds what is known to differ by category. The turns are those of
DeSTSeg's published training code (its three category lists): a category is
turned where its images have no fixed orientation. The foregrounds are those of
RealNet's (datasets/realnet_dataset.py) where it finds the object by Otsu's
threshold; in textures, cable and transistor it uses the whole image, in
hazelnut, metal_nut and toothbrush another threshold ('triangle'), which is not
offered here. Textures are learned by Adam: Muon's student fits the few patches
that all their images are made of too well (docs/results.md, leather).
"""

import ml_collections

from configs import default

_FREE = {'rotate_90': True, 'rotate_degrees': 5.0}
_SLIGHT = {'rotate_degrees': 5.0}
_OBJECT = {'foreground': 'otsu'}

# {category: what differs in `synthesis`}.
CATEGORIES = {
  'bottle': {**_FREE, **_OBJECT},
  'cable': _SLIGHT,
  'capsule': _OBJECT,
  'carpet': _FREE,
  'grid': {**_FREE, **_OBJECT},
  'hazelnut': _FREE,
  'leather': _FREE,
  'metal_nut': {},
  'pill': _OBJECT,
  'screw': {**_FREE, **_OBJECT},
  'tile': _FREE,
  'toothbrush': {},
  'transistor': {},
  'wood': _SLIGHT,
  'zipper': {**_SLIGHT, **_OBJECT},
}

TEXTURES = ('carpet', 'grid', 'leather', 'tile', 'wood')


def get_config(categories: str = '') -> ml_collections.ConfigDict:
  """Returns the configuration of some categories; '' means all 15.

  Raises:
    ValueError: an unknown category; the message lists the known ones.
  """
  names = [name.strip() for name in categories.split(',') if name.strip()]
  unknown = [name for name in names if name not in CATEGORIES]
  if unknown:
    raise ValueError(
      f'unknown MVTec AD category {", ".join(unknown)}; choose from'
      f' {", ".join(CATEGORIES)}'
    )
  config = default.get_config()
  config.data.root = 'data/mvtec'
  config.head.border = 2
  config.data.category = ','.join(names or CATEGORIES)
  rows = {name: {'synthesis': row} for name, row in CATEGORIES.items() if row}
  for name in TEXTURES:
    rows.setdefault(name, {})['train'] = {'student': {'kind': 'adam'}}
  config.per_category = ml_collections.ConfigDict(rows)
  return config
