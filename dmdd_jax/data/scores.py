"""Image scores from a CSV file that any program wrote.

Synopsis:

  rows = scores.read_scores('scores.csv')
  values, unused = scores.match_scores(rows, 'data/mvtec', records)
"""

from collections.abc import Sequence
import csv
import math
import os

from dmdd_jax.data import files
from dmdd_jax.data import records as records_lib

# A score's file may be the image or its map; neither need have a suffix.
_SUFFIXES = (*files.SUFFIXES, '.npy')


class BadScoresError(ValueError):
  """A table of scores cannot be used; the message names file and line."""


def read_scores(path: str) -> list[tuple[str, float]]:
  """Reads a CSV file with the columns `file` and `score`.

  Further columns are ignored. Backslashes in file names become slashes.

  Returns:
    Pairs of file name and score, in the order of the lines.

  Raises:
    MissingDataError: there is no such file.
    BadScoresError: a column is missing, or a score is no finite number.
  """
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise files.MissingDataError(f'there is no file {path!r}')
  rows = []
  try:
    # utf-8-sig: spreadsheets write a byte-order mark before the first name.
    with open(
      path, newline='', encoding='utf-8-sig', errors='surrogateescape'
    ) as file:
      table = csv.DictReader(file)
      header = table.fieldnames or ()
      if not {'file', 'score'} <= set(header):
        raise BadScoresError(
          f'{path} has the columns {", ".join(header) or "(none)"}; expected'
          ' file and score, separated by a comma'
        )
      for row in table:
        rows.append((row['file'].replace('\\', '/'), float(row['score'])))
        if not math.isfinite(rows[-1][1]):
          raise ValueError(f'{row["score"]} is not finite')
  except BadScoresError:
    raise
  except (AttributeError, TypeError, ValueError, csv.Error) as error:
    raise BadScoresError(
      f'{path}, line {table.line_num}: expected a file and a finite score'
      f' ({error})'
    ) from error
  return rows


def match_scores(
  rows: Sequence[tuple[str, float]],
  data_root: str,
  records: Sequence[records_lib.Record],
) -> tuple[list[float | None], list[str]]:
  """The score of each image.

  A row belongs to an image if the parts of one path end with those of the
  other: `good/000.png`, `screw/test/good/000` and `/elsewhere/screw/test/good/
  000.tiff` all name ROOT/screw/test/good/000.png. Suffixes do not count.

  Args:
    rows: of `read_scores`.
    data_root: the folder of the data set.
    records: N test images.

  Returns:
    N scores, None where there is none, and the files of rows without an image.

  Raises:
    BadScoresError: a row belongs to several images, or an image has several
      rows.
  """
  root = _parts(files.absolute(data_root))
  images = [_parts(record.image) for record in records]
  by_name: dict[str, list[int]] = {}
  for index, parts in enumerate(images):
    by_name.setdefault(parts[-1], []).append(index)
  values: list[float | None] = [None] * len(records)
  unused = []
  for name, score in rows:
    parts = _parts(name)
    matches = [
      index
      for index in by_name.get(parts[-1], ())
      if _ends(images[index], parts) or _ends(parts, images[index][len(root) :])
    ]
    if len(matches) > 1:
      paths = files.abbreviate([records[index].image for index in matches])
      raise BadScoresError(
        f'the score of {name!r} could be that of {len(matches)} images,'
        f' {paths}: write more of the path into the column file'
      )
    if not matches:
      unused.append(name)
    elif values[matches[0]] is not None:
      raise BadScoresError(
        f'{records[matches[0]].image} has two scores, the second as {name!r}'
      )
    else:
      values[matches[0]] = score
  return values, unused


def _parts(path: str) -> list[str]:
  """The parts of a path, the last without its suffix."""
  stem, suffix = os.path.splitext(path)
  path = stem if suffix.lower() in _SUFFIXES else path
  return [part for part in path.split('/') if part not in ('', '.')] or ['']


def _ends(parts: Sequence[str], tail: Sequence[str]) -> bool:
  """Whether the last of some parts are `tail`; never with an empty one."""
  return bool(tail) and list(parts[-len(tail) :]) == list(tail)
