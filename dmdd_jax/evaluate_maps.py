"""Metrics of anomaly maps and image scores that any software wrote to files.

Synopsis:

  data = {'name': 'mvtec_ad', 'root': 'data/mvtec'}
  evaluated = evaluate_maps.evaluate_maps('submission', data)
  storage.write_texts('results', evaluate_maps.tables(evaluated))
"""

from collections.abc import Mapping, Sequence
import csv
import io
import math
import os
import re
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from configs import default
from dmdd_jax import truth as truth_lib
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import loco
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import scores as score_files
from dmdd_jax.metrics import details
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results as results_lib

# Layouts whose one category is no folder.
_ALONE = (layouts.FOLDER, layouts.KOLEKTOR, layouts.MAGNETIC_TILE)
# Layouts in which any folder may be a category.
_ANY = (layouts.MVTEC_AD, 'mpdd')


class Evaluated(NamedTuple):
  """What was measured of one category.

  Attributes:
    metrics: what `metrics.results.compute` returns, sPRO for MVTec LOCO, and
      how it was measured: `image_score`, `maps_resized`, `unused_maps`.
    images: a row for each image: file, label, defect, score and, with maps,
      the columns of `metrics.details.images`.
    defects: a row for each region of a mask: file, defect and the columns of
      `metrics.details.defects`.
  """

  metrics: dict[str, Any]
  images: list[dict[str, Any]]
  defects: list[dict[str, Any]]


def evaluate_maps(
  maps_root: str,
  data: Mapping[str, Any],
  categories: Sequence[str] = (),
  *,
  scores_file: str = '',
  score: str = '',
  resize: bool = False,
  pro_limits: Sequence[float] = (0.3, 0.05),
  rows: bool = True,
) -> dict[str, Evaluated]:
  """Evaluates maps and scores against ground truth, category by category.

  Args:
    maps_root: a map for every test image below it, as `data.maps.find_root` and
      `find_maps` describe; '' for image metrics alone, from `scores_file`.
    data: `name`, the layout, and `root`, where the set was unpacked; training
      images may be missing. For the layout 'folder' also `test_normal`,
      `defect` and `masks`, see configs/default.py.
    categories: which; by default those that have maps, or scores.
    scores_file: a CSV of image scores, see `data.scores`; '' for none.
    score: where image scores come from: 'max', the map's highest pixel; 'topN',
      the mean of its N highest; 'csv'. By default 'csv' with a file and
      'top100' without. They are taken before a map is resized.
    resize: whether maps of another size than their image are resized.
    pro_limits: false-positive rates up to which AU-PRO (and sPRO) is taken.
    rows: whether to measure each image's map and each defect, which takes as
      long as all the rest.

  Returns:
    {category: what was measured}

  Raises:
    MissingDataError, DatasetError, BadImageError: the data set is at fault.
    BadMapError: a map is missing, is there twice or cannot be used.
    BadScoresError: the same of a score.
    ValueError: `score` is none of these.
  """
  top = _top_pixels(score, scores_file, maps_root)
  root = files.absolute(data['root'])
  base, names = _choose(maps_root, root, data['name'], categories)
  records = {
    name: layouts.list_dataset(_fields(data, name), with_train=False).test
    for name in names
  }
  given: dict[str, list[float | None]] = {}
  if top is None:
    given = _given_scores(scores_file, root, records, not (categories or base))
    records = {name: records[name] for name in given}
  evaluated = {}
  for name, tests in records.items():
    if not tests:
      raise files.DatasetError(f'{name}: found no test image in {root}')
    paths, unused = [], []
    if base:
      paths, unused = map_files.find_maps(base, root, name, tests)
    if unused:
      logging.warning(
        '%s: %d maps belong to no test image and are not used: %s',
        name,
        len(unused),
        files.abbreviate(unused),
      )
    with results_lib.MapStore(exact=True) as store:
      scores, resized = _read_maps(paths, tests, store, top, resize)
      if top is None:
        scores = given[name]
      evaluated[name] = _measure(
        _fields(data, name), tests, store, scores, pro_limits, rows
      )
    evaluated[name].metrics['image_score'] = score or (
      'csv' if top is None else f'top{top}'
    )
    if base:
      evaluated[name].metrics['maps_resized'] = resized
    if unused:
      evaluated[name].metrics['unused_maps'] = [
        os.path.relpath(path, base) for path in unused
      ]
    if resized:
      logging.warning(
        '%s: %d of %d maps had another size than their image and were resized',
        name,
        resized,
        len(tests),
      )
    logging.info('%s: %d test images', name, len(tests))
  return evaluated


def tables(evaluated: Mapping[str, Evaluated]) -> dict[str, str]:
  """The results as texts by file name, for `storage.write_texts`.

  results.json, results.csv and results.md as of `results.format_tables`;
  images.csv and defects.csv with the rows of all categories.
  """
  texts = results_lib.format_tables(
    {name: each.metrics for name, each in evaluated.items()}
  )
  choices = sorted({each.metrics['image_score'] for each in evaluated.values()})
  resized = sum(
    each.metrics.get('maps_resized', 0) for each in evaluated.values()
  )
  notes = [f'Image score: {", ".join(choices)}.']
  if resized:
    notes.append(f'{resized} maps were resized to the size of their image.')
  texts['results.md'] += '\n' + ' '.join(notes) + '\n'
  for part in ('images', 'defects'):
    rows = [
      {'category': name, **row}
      for name, each in evaluated.items()
      for row in getattr(each, part)
    ]
    if rows:
      texts[f'{part}.csv'] = _csv(rows)
  return texts


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows as CSV; NaN is empty."""
  text = io.StringIO()
  names = list(dict.fromkeys(name for row in rows for name in row))
  table = csv.DictWriter(text, names, lineterminator='\n')
  table.writeheader()
  for row in rows:
    table.writerow(
      {
        k: '' if isinstance(v, float) and math.isnan(v) else v
        for k, v in row.items()
      }
    )
  return text.getvalue()


def _top_pixels(score: str, scores_file: str, maps_root: str) -> int | None:
  """How many of a map's highest pixels make its image score; None for a CSV."""
  score = score or ('csv' if scores_file else 'top100')
  match = re.fullmatch(r'max|csv|top([1-9]\d*)', score)
  if not match:
    raise ValueError(
      f'score is {score!r}; expected max, csv, or top and a number of pixels'
      ' (top100)'
    )
  if (score == 'csv') != bool(scores_file):
    raise ValueError(
      f'score is {score!r} and the CSV of scores {scores_file!r}: name a CSV to'
      ' use its scores, and none to take them from the maps'
    )
  if score == 'csv':
    return None
  if not maps_root:
    raise ValueError('there are neither maps nor a CSV of scores')
  return int(match[1] or 1)


def _fields(data: Mapping[str, Any], category: str) -> dict[str, Any]:
  """All fields of `config.data` of one category, by default the defaults."""
  return {**default.get_config().data, **data, 'category': category}


def _choose(
  maps_root: str, root: str, layout: str, categories: Sequence[str]
) -> tuple[str, list[str]]:
  """The folder in which the maps begin, '' without maps; the categories."""
  maps_root = files.absolute(maps_root) if maps_root else ''
  if maps_root and not os.path.isdir(maps_root):
    raise files.MissingDataError(f'there is no folder {maps_root!r}')
  if not os.path.isdir(root):
    raise files.MissingDataError(f'there is no folder of data {root!r}')
  if layout in _ALONE:
    return maps_root, list(categories or [layout])
  known = list(categories)
  if not known:
    known = list(
      files.folders(root) if layout in _ANY else layouts.CATEGORIES[layout]
    )
    inside = 'test' if layout in _ANY else ''
    known = [n for n in known if os.path.isdir(os.path.join(root, n, inside))]
    if not known:
      raise files.MissingDataError(
        f'{root} holds no category of the layout {layout}'
      )
  if not maps_root:
    return '', known
  base = map_files.find_root(maps_root, layout, known)
  if not categories:
    known = [name for name in known if os.path.isdir(os.path.join(base, name))]
  return base, known


def _given_scores(
  path: str,
  root: str,
  records: Mapping[str, Sequence[records_lib.Record]],
  choose: bool,
) -> dict[str, list[float | None]]:
  """{category: scores of its images} from a CSV.

  With `choose`, categories without any score are not meant.
  """
  joined = [record for tests in records.values() for record in tests]
  values, unused = score_files.match_scores(
    score_files.read_scores(path), root, joined
  )
  rest = iter(values)
  given = {name: [next(rest) for _ in tests] for name, tests in records.items()}
  if choose:
    given = {
      name: each for name, each in given.items() if set(each) - {None}
    } or given
  for name, each in given.items():
    missing = [
      record.image
      for record, value in zip(records[name], each, strict=True)
      if value is None
    ]
    if missing:
      raise score_files.BadScoresError(
        f'{path} has no score for {len(missing)} of {len(each)} test images of'
        f' {name}: {files.abbreviate(missing)}'
      )
  if unused:
    logging.warning(
      '%s: %d scores belong to no test image and are not used: %s',
      path,
      len(unused),
      files.abbreviate(unused),
    )
  return given


def _read_maps(
  paths: Sequence[str],
  records: Sequence[records_lib.Record],
  store: results_lib.MapStore,
  top: int | None,
  resize: bool,
) -> tuple[list[float], int]:
  """Fills the store; returns image scores and how many maps were resized."""
  scores, resized = [], 0
  for path, record in zip(paths, records):
    mask = _read_mask(record)
    values = map_files.read_map(path)
    scores.append(map_files.top_mean(values, top or 1))
    fitted = map_files.fit_map(path, values, mask.shape, resize)
    resized += fitted is not values
    store.append(fitted, mask)
  return scores, resized


def _read_mask(record: records_lib.Record) -> np.ndarray:
  """The mask (H, W) in {0, 1} of an image, whose size it must have."""
  size = images_lib.native_size(record.image)
  if record.mask is None:
    return np.zeros(size, np.uint8)
  mask = images_lib.native_mask(record)
  if mask.shape != size:
    raise files.BadImageError(
      f'{record.mask}: the mask is {mask.shape[0]} x {mask.shape[1]} (height x'
      f' width) and its image {record.image} {size[0]} x {size[1]}; expected'
      ' equal sizes'
    )
  return mask


def _measure(
  data: Mapping[str, Any],
  records: Sequence[records_lib.Record],
  store: results_lib.MapStore,
  scores: Sequence[float | None],
  pro_limits: Sequence[float],
  rows: bool,
) -> Evaluated:
  """All figures of a category; of pixels where there are maps and masks."""
  labels = np.array([record.label for record in records])
  unknown = truth_lib.unknown(records) if len(store) else None
  metrics = results_lib.compute(
    None if not len(store) else store.maps if unknown else store,
    None,
    np.array(scores, float),
    labels,
    pro_limits=pro_limits,
  )
  if unknown:
    truth_lib.explain(metrics, 'no masks', unknown)
  images = [
    {
      'file': os.path.relpath(record.image, files.absolute(data['root'])),
      'label': record.label,
      'defect': record.defect,
      'score': value,
    }
    for record, value in zip(records, scores, strict=True)
  ]
  if unknown or not len(store):
    return Evaluated(metrics, images, [])
  if data['name'] == loco.NAME:
    limits = {
      results_lib.pro_key(limit).replace('au_pro', 'spro'): limit
      for limit in pro_limits
    }
    truth_lib.add_spro(metrics, data, records, store.maps, limits)
  if not rows:
    return Evaluated(metrics, images, [])
  pixels = region.prepare(store, None)
  defects = details.defects(pixels, pro_limits)
  measured = details.images(pixels, labels, defects)
  images = [image | row for image, row in zip(images, measured, strict=True)]
  named = []
  for row in defects:
    image = images[row.pop('image')]
    named.append({'file': image['file'], 'defect': image['defect'], **row})
  return Evaluated(metrics, images, named)
