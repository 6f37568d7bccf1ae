"""What a data set is a list of, and which of it is held out.

Synopsis:

  dataset = layouts.list_dataset(config.data)
  train, held_out = records.hold_out(dataset.train, config.data, config.seed)
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from absl import logging

from dmdd_jax.data import files

GOOD = 'good'
_MASK_ENDS = (
  '_mask',
  '',
  '_gt',
  '_label',
  '_labels',
  '_seg',
  '_segmentation',
  '_annotation',
  '_truth',
  '_ground_truth',
)
_MASK_BEGINS = ('mask_', 'gt_', 'label_', 'seg_')
DEFECT = 'defect'  # Of a defective image that lies in no folder of its own.


@dataclasses.dataclass(frozen=True)
class Record:
  """One image on disk.

  Attributes:
    image: absolute path of the image.
    mask: absolute path of its mask, None for a good image; None for a
      defective one means that its defect's place is not known. Where it is a
      folder, the masks in it are laid over each other.
    label: 0 for good, 1 for defective; the folder decides.
    defect: name of the folder the image lies in, 'good' for label 0.
  """

  image: str
  mask: str | None
  label: int
  defect: str

  @property
  def has_truth(self) -> bool:
    """Whether it is known which of the pixels are defective."""
    return self.mask is not None or not self.label


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One category: its good training images and its test images."""

  category: str
  train: tuple[Record, ...]
  test: tuple[Record, ...]


def mask_names(stem: str) -> tuple[str, ...]:
  """The file names, without suffix, that the mask of an image may have.

  Args:
    stem: the image's.

  Returns:
    The first that is there is the mask: ID_mask, ID, ID_gt, ..., mask_ID, ...
  """
  names = [stem + end for text in _MASK_ENDS for end in (text, text.upper())]
  names += [
    begin + stem for text in _MASK_BEGINS for begin in (text, text.upper())
  ]
  return tuple(dict.fromkeys(names))


def hold_out(
  records: Iterable[Record], data: Mapping[str, Any], seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
  """Splits normal images into those to train on and those held out.

  This is the one split that training, calibration and validation use.

  Args:
    records: normal training images, N of them.
    data: `config.data`; `holdout_fraction` and `holdout_min` are read.
    seed: `config.seed`.

  Returns:
    (train, held_out), see `split_holdout`.
  """
  fraction, minimum = data['holdout_fraction'], data['holdout_min']
  return split_holdout(records, fraction, minimum, seed)


def split_holdout(
  records: Iterable[Record], fraction: float, minimum: int, seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
  """Draws a share of the records to be held out.

  The choice depends on the file names and the seed alone: not on the order of
  the records, nor on where the data lies.

  Args:
    records: N records.
    fraction: share to hold out, in [0, 0.5]; 0 holds nothing out.
    minimum: hold out at least as many, when fraction > 0; but never more than
      half of the records, rounded down (so none of one).
    seed: any integer.

  Returns:
    (train, held_out), both sorted by path.

  Raises:
    ValueError: fraction outside [0, 0.5], or minimum negative.
  """
  if not 0 <= fraction <= 0.5:
    raise ValueError(f'Held-out fraction: found {fraction}, expected [0, 0.5].')
  if minimum < 0:
    raise ValueError(f'Held-out minimum: found {minimum}, expected >= 0.')
  records = sorted(records, key=lambda record: record.image)
  count = max(minimum, round(fraction * len(records))) if fraction else 0
  count = min(count, len(records) // 2)
  drawn = sorted(records, key=lambda record: files.draw(record.image, seed))
  held_out = frozenset(drawn[:count])
  return (
    tuple(record for record in records if record not in held_out),
    tuple(record for record in records if record in held_out),
  )


def find_mask(image: str, masks: Mapping[str, str]) -> str | None:
  """The mask of an image among {stem: path}; None without one."""
  names = mask_names(files.stem(image))
  return next((masks[name] for name in names if name in masks), None)


def good(path: str) -> Record:
  """The record of a good image."""
  return Record(path, None, 0, GOOD)


def split_test(
  train: Sequence[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
  """Moves a share of the normal images from training to the test."""
  if not 0.0 < fraction <= 0.5:
    raise ValueError(
      f'config.data.test_fraction must be in (0, 0.5], is {fraction}'
    )
  if len(train) < 2:
    raise files.DatasetError(
      f'{train[0].image} is the only normal image: none can be held for the'
      ' test. Add images, or set --config.data.test_normal.'
    )
  kept, test = split_holdout(train, fraction, 1, seed)
  logging.info(
    'config.data.test_normal is not set: %d of %d normal images are held for'
    ' the test and not trained on',
    len(test),
    len(train),
  )
  return list(kept), list(test)
