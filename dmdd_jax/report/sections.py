"""The content of the report's sections, as the template page.html wants it.

Every function turns categories into plain texts and numbers. The template
writes the HTML, the charts alone are SVG already.

Synopsis:

  template.render(**sections.context(categories))
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import math
import re
from typing import Any

import markupsafe
import matplotlib
import numpy as np

from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.report import category as category_lib
from dmdd_jax.report import charts
from dmdd_jax.report import published

# Images whose data lie in one element of the page; it is split when needed.
_CHUNK = 40
_OWN = 'AU-PRO of MVTec: all test images pooled, limit 0.3'
_PRO_LIMIT = 0.3
# (group, heading, key of the flattened results), of the table.
_COLUMNS = (
  ('images', 'AUROC', 'image_auroc'),
  ('images', 'AP', 'image_ap'),
  ('pixels', 'AUROC', 'pixel_auroc'),
  ('pixels', 'AP', 'pixel_ap'),
  ('pixels', 'AU‑PRO', 'au_pro'),
  ('pixels', 'AU‑PRO 5 %', 'au_pro_005'),
  ('at the threshold', 'image F1', 'at_threshold/image_f1'),
  ('at the threshold', 'pixel F1', 'at_threshold/pixel_f1'),
  ('mean of the maps', 'image AUROC', 'maps_mean/image_auroc'),
  ('mean of the maps', 'pixel AUROC', 'maps_mean/pixel_auroc'),
  ('mean of the maps', 'AU‑PRO', 'maps_mean/au_pro'),
)
# (name, key of the flattened results), of the few figures to see first.
_HEADLINES = (
  ('image AUROC', 'image_auroc'),
  ('pixel AUROC', 'pixel_auroc'),
  ('AU-PRO', 'au_pro'),
)


def context(categories: Sequence[category_lib.Category]) -> dict[str, Any]:
  """The template's variables, but for the title and the script."""
  gallery, chunks = _gallery(categories)
  return {
    'provenance': _provenance(categories),
    'tiles': _tiles(categories),
    'results': _results_table(categories),
    'verdicts': [_verdicts(one) for one in categories],
    'anchors': anchors_table(categories),
    'categories': [_category(one, len(categories)) for one in categories],
    'colors': _color_tables(),
    'gradient': _gradient(),
    'gallery': gallery,
    'chunks': chunks,
  }


def percent(value: float | None, digits: str = '.2f') -> str:
  """A fraction in per cent; a dash where it is not known."""
  if value is None or not math.isfinite(value):
    return markupsafe.Markup('<span class="none">–</span>')
  return f'{100 * value:{digits}}'


def _provenance(
  categories: Sequence[category_lib.Category],
) -> list[tuple[str, str]]:
  """What the results came from: (name, values)."""
  facts: dict[str, list[Any]] = {}
  for category in categories:
    results = category.results
    config = results.get('config', {})
    data = config.get('data', {})
    for name, value in (
      ('finished', _time(results.get('finished') or '')),
      ('teacher', config.get('teacher', {}).get('arch')),
      ('image size', data.get('image_size')),
      ('steps', results.get('step')),
      ('seed', results.get('seed')),
      ('device', results.get('device')),
      ('revision', (results.get('git_revision') or '')[:12]),
      ('jax', results.get('versions', {}).get('jax')),
    ):
      if value not in (None, '', *facts.get(name, ())):
        facts.setdefault(name, []).append(value)
  if 'finished' in facts:
    facts['finished'] = [max(facts['finished'])]
  return [
    (name, ', '.join([*map(str, values[:3])] + ['...'] * (len(values) > 3)))
    for name, values in facts.items()
  ]


def _tiles(
  categories: Sequence[category_lib.Category],
) -> list[tuple[str, str, str]]:
  """The few figures to see first: (name, value, unit or total)."""
  rows = [results_lib.flatten(c.results) for c in categories]
  prefix = 'mean ' if len(rows) > 1 else ''
  tiles = [
    (prefix + name, percent(_mean([row.get(key) for row in rows])), '%')
    for name, key in _HEADLINES
  ]
  if all(c.rows and c.calibration.images for c in categories):
    for name, label, wrong in (
      ('missed', 1, sum(c.missed for c in categories)),
      ('false alarms', 0, sum(c.alarms for c in categories)),
    ):
      total = sum(c.count(label) for c in categories)
      kind = 'defective' if label else 'good'
      tiles.append((name, str(wrong), f'of {total} {kind}'))
  return tiles


def _results_table(
  categories: Sequence[category_lib.Category],
) -> dict[str, Any]:
  """The table of this run: a row per category, and their mean."""
  groups: dict[str, int] = {}
  for group, _, _ in _COLUMNS:
    groups[group] = groups.get(group, 0) + 1
  flat = [results_lib.flatten(c.results) for c in categories]
  rows = [_results_row(c.name, row, c) for c, row in zip(categories, flat)]
  if len(rows) > 1:
    mean = {key: _mean([row.get(key) for row in flat]) for *_, key in _COLUMNS}
    rows.append(_results_row('mean', mean, None))
  return {
    'groups': groups,
    'heads': [head for _, head, _ in _COLUMNS],
    'rows': rows,
  }


def _results_row(
  name: str, row: Mapping[str, Any], category: category_lib.Category | None
) -> dict[str, Any]:
  """A row of a category, or of the mean, which has no category."""
  reasons = category.results.get('undefined', {}) if category else {}
  counts: list[int | str] = ['', '', '', '']
  if category is not None and category.rows:
    counts[:2] = [category.count(0), category.count(1)]
    if category.calibration.images:
      counts[2:] = [category.missed, category.alarms]
  cells = []
  for *_, key in _COLUMNS:
    ends = row.get(f'{key}_low'), row.get(f'{key}_high')
    cells.append(
      {
        'value': row.get(key),
        'interval': None if None in ends else ends,
        'reason': str(reasons.get(key, '')),
      }
    )
  return {
    'name': name,
    'is_mean': category is None,
    'counts': counts,
    'cells': cells,
  }


def _verdicts(category: category_lib.Category) -> dict[str, Any]:
  """What a category's threshold asked for, and what the test saw."""
  calibration = category.calibration
  at = category.results.get('at_threshold', {})
  good, defective = category.count(0), category.count(1)
  calibrated = bool(calibration.images)

  def share(count: int, total: int) -> float | None:
    return count / total if calibrated and total else None

  confidence = at.get('confidence') or {}
  return {
    'name': category.name,
    'threshold': _number(calibration.image_threshold),
    'held_out': calibration.images,
    'asked': at.get('image_false_positive_rate_asked'),
    'seen': share(category.alarms, good),
    'interval': confidence.get('image_false_positive_rate'),
    'alarms': category.alarms if calibrated else '',
    'good': good,
    'recall': share(defective - category.missed, defective),
    'missed': category.missed if calibrated else '',
    'defective': defective,
    'warnings': at.get('warnings', []),
  }


def anchors_table(
  categories: Sequence[category_lib.Category],
) -> dict[str, Any] | None:
  """This run beside published figures, by category and over all 15.

  The run has a mean only if it has all of MVTec AD. None where nobody has
  published figures of any category of this run.
  """
  own = {c.name: results_lib.flatten(c.results) for c in categories}
  if not set(own) & set(published.PER_CATEGORY):
    return None
  whole = set(published.MVTEC_AD) <= set(own)
  blocks = [name for name in own if name in published.PER_CATEGORY]
  blocks.append(published.MEAN)
  if whole:
    rows = [own[name] for name in published.MVTEC_AD]
    own[published.MEAN] = {
      key: _mean([row.get(key) for row in rows]) for key in published.KEYS
    }
  rows = [
    {
      'name': 'this run',
      'kind': 'own',
      'digits': '.2f',
      'figures': [
        own.get(name, {}).get(key) for name in blocks for key in published.KEYS
      ],
      'differs': _OWN,
    }
  ]
  for anchor in published.ANCHORS:
    unknown = (None,) * len(published.KEYS)
    figures = [anchor.figures.get(name) or unknown for name in blocks]
    rows.append(
      {
        'name': anchor.name,
        'kind': 'theirs',
        'digits': '.4g',  # As many digits as were published.
        'figures': [figure for block in figures for figure in block],
        'differs': anchor.differs,
      }
    )
  return {'blocks': blocks, 'rows': rows}


def _category(category: category_lib.Category, total: int) -> dict[str, Any]:
  """A category's charts, folded away where there are many categories."""
  row = results_lib.flatten(category.results)
  return {
    'name': category.name,
    'figures': [(name, row.get(key)) for name, key in _HEADLINES],
    'is_open': total <= 2,
    'has_archive': category.archive is not None,
    'has_scalars': bool(category.scalars),
    'charts': [
      *_score_charts(category),
      *_pixel_charts(category),
      *_training_charts(category.scalars),
    ],
  }


def _score_charts(category: category_lib.Category) -> Iterator[str]:
  """Histogram of the scores, and the ROC curve of the images."""
  good, defect = (
    [row['score'] for row in category.rows if row['label'] == label]
    for label in (0, 1)
  )
  if good or defect:
    yield charts.histogram(
      'Image scores',
      [('good', good), ('defective', defect)],
      x_label='score',
      threshold=category.calibration.image_threshold,
    )
  if good and defect:
    lines = []
    for name, key in (
      ('final map', 'score'),
      ('mean of maps', 'maps_mean_score'),
    ):
      scores = np.array([row[key] for row in category.rows])
      labels = np.array([row['label'] for row in category.rows])
      lines.append(charts.Line(name, *ranking.roc_curve(scores, labels)))
    yield charts.lines(
      'ROC of the images',
      lines,
      x_label='false-positive rate',
      y_label='true-positive rate',
      x_range=(0, 1),
      y_range=(0, 1),
      diagonal=True,
    )


def _pixel_charts(category: category_lib.Category) -> Iterator[str]:
  """ROC and PRO of the pixels."""
  curves = category.archive.curves if category.archive is not None else {}
  for key, title, label, end in (
    ('pixel_roc', 'ROC of the pixels', 'true-positive rate', 1.0),
    ('pro', 'PRO, to its limit', 'per-region overlap', _PRO_LIMIT),
  ):
    if key in curves:
      yield charts.lines(
        title,
        [charts.Line('final map', *curves[key])],
        x_label='false-positive rate of the pixels',
        y_label=label,
        x_range=(0, end),
        y_range=(0, 1),
        diagonal=key == 'pixel_roc',
      )


def _training_charts(
  scalars: Mapping[str, tuple[list[int], list[float]]],
) -> Iterator[str]:
  """Losses, and the scores on held-out images with synthetic anomalies."""

  def chosen(prefix: str) -> list[charts.Line]:
    lines = []
    for tag, (steps, values) in sorted(scalars.items()):
      name = tag.removeprefix(prefix)
      finite = np.isfinite(values)
      if tag != name and name != 'gradient_norm' and finite.any():
        steps, values = np.array(steps)[finite], np.array(values)[finite]
        lines.append(charts.Line(name.replace('_', ' '), steps, values))
    return lines

  losses = chosen('train/')
  if any((np.asarray(line.y) > 0).any() for line in losses):
    yield charts.lines(
      'Training losses', losses, x_label='step', y_label='loss', log=True
    )
  if scores := chosen('validation/'):
    yield charts.lines(
      'Validation, synthetic anomalies',
      scores,
      x_label='step',
      y_label='score',
      y_range=(0, 1),
    )


def _gallery(
  categories: Sequence[category_lib.Category],
) -> tuple[dict[str, Any], list[str]]:
  """The script's document (texts and numbers), and the images' data beside.

  The data of an image are one line: thumbnail and map in base64, outlines of
  the prediction and of the truth as SVG paths, separated by '|'. _CHUNK lines
  are a chunk.
  """
  document: dict[str, Any] = {'chunk': _CHUNK, 'categories': [], 'items': []}
  lines = []
  for index, category in enumerate(categories):
    archive, calibration = category.archive, category.calibration
    if archive is None:
      continue
    threshold = calibration.image_threshold
    if math.isnan(threshold):  # Used for sorting only: there are no verdicts.
      threshold = category.results.get('image_f1_max_threshold') or 0.0
    document['categories'].append(
      {
        'index': index,
        'name': category.name,
        'mime': archive.mime,
        'threshold': _number(calibration.image_threshold),
        'pixelThreshold': _number(calibration.pixel_threshold),
        'colors': [_number(end) for end in archive.colors],
      }
    )
    for i, (row, item) in enumerate(zip(category.rows, archive.items)):
      beyond = (row['score'] - threshold) / calibration.image_scale
      document['items'].append(
        {
          'category': len(document['categories']) - 1,
          'file': row['file'],
          'defect': row['defect'],
          'label': row['label'],
          'score': _number(row['score']),
          'control': _number(row['maps_mean_score']),
          'verdict': row['verdict'],
          'error': _number(-beyond if row['label'] else beyond),
          'overlap': item['overlap'],
        }
      )
      image, shades = (base64.b64encode(d).decode() for d in archive.read(i))
      # '-' is an outline that is not known, '' one that is empty.
      outlines = (
        '-' if path is None else path
        for path in (item['prediction'], item['truth'])
      )
      lines.append('|'.join((image, shades, *outlines)))
  chunks = [
    '\n'.join(lines[start : start + _CHUNK])
    for start in range(0, len(lines), _CHUNK)
  ]
  return document, chunks


def _color_tables() -> list[tuple[str, str]]:
  """The maps' colours as the tables of an SVG filter: (channel, values)."""
  table = matplotlib.colormaps['turbo'](np.linspace(0, 1, 33))
  return [
    (channel, ' '.join(f'{value:.3f}' for value in table[:, i]))
    for i, channel in enumerate('RGB')
  ]


def _gradient() -> str:
  """The same colours as a gradient of CSS."""
  table = matplotlib.colormaps['turbo'](np.linspace(0, 1, 17), bytes=True)
  return ','.join(f'rgb({r},{g},{b})' for r, g, b, _ in table.tolist())


def _mean(values: Sequence[float | None]) -> float:
  return float(np.mean([math.nan if v is None else v for v in values]))


def _number(value: float) -> float | None:
  """Six digits for the page; None for NaN."""
  return float(f'{value:.6g}') if math.isfinite(value) else None


def _time(text: str) -> str:
  """A time of provenance.py without its seconds."""
  return re.sub(r'T(\d+:\d+):\d+\+00:00$', r' \1 UTC', text)
