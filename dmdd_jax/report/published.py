"""Published figures on MVTec AD, to compare with; not measured here.

Each row says what differs: the sets of images, the teacher, the definition of
PRO. None was tuned or rerun here except where the name says so.
"""

import dataclasses

from dmdd_jax.data import layouts

MVTEC_AD = layouts.CATEGORIES[layouts.MVTEC_AD]
MEAN = 'mean of MVTec AD'
# The figures of a row, by the keys of `metrics.results`.
KEYS = ('image_auroc', 'pixel_auroc', 'au_pro')
# Categories of which the figures of others are known.
PER_CATEGORY = ('screw', 'toothbrush')


@dataclasses.dataclass(frozen=True)
class Anchor:
  """Numbers of a method.

  Attributes:
    name: of the method and the source.
    figures: {category or MEAN: (image AUROC, pixel AUROC, PRO)}, fractions,
      None where not published.
    differs: what to know before comparing.
  """

  name: str
  figures: dict[str, tuple[float | None, float | None, float | None]]
  differs: str


ANCHORS = (
  Anchor(
    'DMDD, paper',
    {MEAN: (None, 0.9885, 0.9613)},
    'theirs; no figures per category, no code, PRO code not known',
  ),
  Anchor(
    'PatchCore WRN50, official results',
    {
      MEAN: (0.992, 0.981, 0.944),
      'screw': (0.988, 0.995, 0.985),
      'toothbrush': (1.0, 0.986, 0.948),
    },
    'theirs; WideResNet-50 features in a memory bank, no training',
  ),
  Anchor(
    'EfficientAD-M, rerun',
    {
      MEAN: (0.991, None, 0.937),
      'screw': (0.974, None, 0.973),
      'toothbrush': (1.0, None, 0.945),
    },
    'a rerun by others; a teacher of its own, official PRO',
  ),
  Anchor(
    'EfficientAD-S, rerun',
    {
      MEAN: (0.990, None, 0.933),
      'screw': (0.979, None, 0.956),
      'toothbrush': (1.0, None, 0.946),
    },
    'a rerun by others; a teacher of its own, official PRO',
  ),
  Anchor(
    'RD++',
    {MEAN: (0.994, 0.983, 0.950)},
    'theirs; WideResNet-50; PRO per defective image, averaged: does not'
    ' compare',
  ),
  Anchor(
    'DeSTSeg',
    {MEAN: (0.986, 0.979, None)},
    'theirs; ResNet-18; pixel AP 75.8',
  ),
  Anchor(
    'PatchCore-like, ResNet-18, 256 px',
    {
      'screw': (0.824, 0.983, None),
      'toothbrush': (0.978, 0.990, None),
    },
    'run on the same images and cut as ours; the others used the official'
    ' cut of toothbrush',
  ),
)
