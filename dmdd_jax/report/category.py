"""What the report reads of one category: results, scores, pictures, scalars.

Synopsis:

  for folder in category.find_folders('runs/mvtec'):
    with category.read(folder, folder) as one:
      print(one.name, one.missed, one.alarms)
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import os
from typing import Any

from absl import logging

from dmdd_jax import storage
from dmdd_jax import verdict as verdict_lib
from dmdd_jax.report import archive as archive_lib
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.training import scalars as scalars_lib


@dataclasses.dataclass(frozen=True)
class Category:
  """What is on disk of one category.

  Attributes:
    name: of the category.
    results: of results.json.
    rows: of scores.csv, empty if there is no such file.
    archive: the thumbnails and curves, or None.
    scalars: {tag: (steps, values)} of scalars.jsonl, empty if there is none.
  """

  name: str
  results: dict[str, Any]
  rows: list[dict[str, Any]]
  archive: archive_lib.Archive | None
  scalars: dict[str, tuple[list[int], list[float]]]

  @property
  def calibration(self) -> calibration_lib.Calibration:
    """The thresholds; NaN where they are null."""
    document = {
      key: math.nan if value is None else value
      for key, value in self.results['calibration'].items()
    }
    return calibration_lib.from_dict(document)

  def count(self, label: int, verdict: str | None = None) -> int:
    """Test images of a label, with a verdict if one is given."""
    return sum(
      row['label'] == label and verdict in (None, row['verdict'])
      for row in self.rows
    )

  @property
  def missed(self) -> int:
    """Defective images that were called good."""
    return self.count(1, verdict_lib.GOOD)

  @property
  def alarms(self) -> int:
    """Good images that were called defective."""
    return self.count(0, verdict_lib.DEFECTIVE)


def find_folders(workdir: str | os.PathLike) -> list[str]:
  """The folders that hold a category's results: this one, or those in it.

  Raises:
    FileNotFoundError: there are none.
    ValueError: a results.json is not JSON; it is named.
  """
  workdir = os.fspath(workdir)
  candidates = storage.folders(workdir, 'results.json')
  if storage.path(os.path.join(workdir, 'results.json')).exists():
    candidates.insert(0, workdir)
  folders = [
    folder
    for folder in candidates
    if 'calibration' in _read_json(os.path.join(folder, 'results.json'))
  ]
  if not folders:
    raise FileNotFoundError(
      f'{workdir} holds no results.json of a category, nor do the folders in'
      ' it: name the folder of a run, or evaluate it first (--mode evaluate)'
    )
  return folders


@contextlib.contextmanager
def read(
  folder: str | os.PathLike, training: str | os.PathLike
) -> Iterator[Category]:
  """Reads a category; its archive is open until the context ends.

  Args:
    folder: of the results. All files but results.json may be missing.
    training: the folder of scalars.jsonl.

  Raises:
    FileNotFoundError: there is no results.json.
    ValueError: a file cannot be read; it is named.
  """
  results = _read_json(os.path.join(folder, 'results.json'))
  rows = archive_lib.read_scores(folder)
  scalars = scalars_lib.read(training)
  archive = archive_lib.open_archive(folder)
  with contextlib.ExitStack() as stack:
    if archive is not None:
      stack.callback(archive.close)
      if [i['file'] for i in archive.items] != [row['file'] for row in rows]:
        logging.warning(
          '%s: %s and %s are not of the same evaluation; no gallery is made',
          folder,
          archive_lib.SCORES,
          archive_lib.ARCHIVE,
        )
        archive = None
    yield Category(results['category'], results, rows, archive, scalars)


def _read_json(path: str) -> dict[str, Any]:
  try:
    return json.loads(storage.path(path).read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
