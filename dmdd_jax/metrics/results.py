"""All metrics of a test set in one call, and their tables.

metrics = results.compute(maps, masks, scores, labels)
print(results.write_tables({'screw': metrics}, workdir))
"""

import csv
import functools
import io
import json
import math
import os

import numpy as np

from dmdd_jax import storage
from dmdd_jax.metrics import bootstrap as bootstrap_lib
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import region
from dmdd_jax.metrics import store as store_lib

MapStore = store_lib.MapStore

_RANKING = ('auroc', 'ap', 'f1_max', 'f1_max_threshold')
_EXTRA = ('aupimo', 'pro_per_image')
# The order of the columns; other numbers and texts come after these.
METRICS = (
  *(f'image_{name}' for name in _RANKING),
  *(f'pixel_{name}' for name in _RANKING),
  'au_pro',
  'au_pro_005',
  *_EXTRA,
)


# Nested dicts of metrics, whose entries get columns as maps_mean/pixel_auroc.
_NESTED = ('maps_mean', 'at_threshold', 'native', 'model', 'validation')
# The columns of the Markdown table, for reading; the other files have all.
TABLE_COLUMNS = (
  *(f'image_{name}' for name in _RANKING[:3]),
  *(f'pixel_{name}' for name in _RANKING[:3]),
  'au_pro',
  'au_pro_005',
  'spro',
  'spro_005',
  *_EXTRA,
  *(f'maps_mean/{n}' for n in ('image_auroc', 'pixel_auroc', 'au_pro')),
  *(f'native/{n}' for n in ('pixel_auroc', 'au_pro')),
  *(f'at_threshold/{n}' for n in ('image_f1', 'pixel_f1')),
)


def compute(
  maps,
  masks,
  scores,
  labels,
  *,
  pro_limits=(0.3, 0.05),
  extra=_EXTRA,
  bootstrap=0,
  seed=0,
):
  """Computes every metric of a test set, exactly.

  What each is: `ranking.ranking` (AUROC, AP, F1-max), `region.au_pro`,
  `region.aupimo` (mean over defective images, normal images are those of label
  0), `region.pro_per_image` (mean over defective images).

  Args:
    maps: (N, H, W) floats, higher means more anomalous, or a sequence of N
      arrays (H_i, W_i) of any sizes, or a `MapStore`. float32 and float64 are
      used as they are. None for image metrics alone.
    masks: the same shapes, in {0, 1}, 1 on defects and zeros for good images;
      None with a `MapStore`, or for image metrics alone.
    scores: (N,) floats, the images' scores.
    labels: (N,) in {0, 1}, 1 for defective images.
    pro_limits: FPR limits of AU-PRO in (0, 1]; 0.3 gives the key `au_pro`,
      others `au_pro_` and the digits: 0.05 gives `au_pro_005`.
    extra: which of 'aupimo' and 'pro_per_image' to compute as well.
    bootstrap: number of resamplings of the images for confidence intervals.
    seed: of these.

  Returns:
    {metric: float}, fractions in [0, 1] but for the two thresholds, with the
    keys `image_` and `pixel_` + `auroc`, `ap`, `f1_max`, `f1_max_threshold`,
    those of `pro_limits` and `extra`. A metric the set leaves undefined is NaN
    and then `undefined` is {metric: reason}. With bootstrap, `confidence` is
    {metric: [low, high]}, 95 % percentile intervals (thresholds have none).

  Raises:
    ValueError: on NaN or infinite scores, shapes or counts that disagree, mask
      values or labels other than 0 and 1, defect pixels in an image of label
      0; the message names the image's index.
  """
  labels = store_lib.check_labels(labels)
  scores = _check_image_scores(scores, labels)
  _check_options(pro_limits, extra, bootstrap)
  pixels = _prepare(maps, masks, labels)
  found = _named('image', ranking.ranking(scores, labels))
  reasons = _image_reasons(found, labels)
  if pixels is None:
    names = (*_named('pixel', [np.nan] * 4), *map(pro_key, pro_limits), *extra)
    reason = 'no maps' if maps is None else 'no masks'
    found.update(dict.fromkeys(names, float('nan')))
    reasons.update(dict.fromkeys(names, reason))
  else:
    measured, why = _pixel_metrics(pixels, pro_limits)
    found.update(measured)
    reasons.update(why)
  values = None
  if pixels is not None and extra:
    measured, why, values = _extra_metrics(pixels, labels == 0, extra)
    found.update(measured)
    reasons.update(why)
  if reasons:
    found['undefined'] = reasons
  if bootstrap:
    found['confidence'] = _confidence(
      found, pixels, scores, labels, pro_limits, values, bootstrap, seed
    )
  return found


def pro_key(limit):
  """The key of AU-PRO at an FPR limit: `au_pro` at 0.3, else `au_pro_005`."""
  return 'au_pro' if limit == 0.3 else 'au_pro_' + f'{limit:g}'.replace('.', '')


def _named(prefix, values):
  return {f'{prefix}_{k}': v for k, v in zip(_RANKING, values, strict=True)}


def _check_image_scores(scores, labels):
  """Returns (N,) finite float scores, or raises ValueError."""
  scores = np.asarray(scores)
  if scores.shape != labels.shape:
    raise ValueError(
      f'scores have shape {scores.shape} and labels {labels.shape}; both must '
      'be (N,)'
    )
  for index in np.flatnonzero(~np.isfinite(scores)):
    raise ValueError(
      f'the score of image {index} is {scores[index]}; every score must be '
      'finite'
    )
  return store_lib.check_scores(scores, 'scores')


def _check_options(pro_limits, extra, bootstrap):
  for limit in pro_limits:
    if not 0 < limit <= 1:
      raise ValueError(f'pro_limits holds {limit}, expected values in (0, 1]')
  for name in extra:
    if name not in _EXTRA:
      raise ValueError(f'extra holds {name!r}, expected some of {_EXTRA}')
  if bootstrap < 0:
    raise ValueError(f'bootstrap is {bootstrap}, expected 0 or more')


def _prepare(maps, masks, labels):
  """Returns the checked `region.Pixels`, or None without maps or masks."""
  if maps is not None and len(maps) != len(labels):
    raise ValueError(f'there are {len(maps)} maps and {len(labels)} labels')
  if isinstance(maps, store_lib.MapStore):
    if masks is not None:
      raise ValueError('a MapStore brings its own masks; pass masks=None')
  elif maps is None or masks is None:
    for index in range(0 if maps is None else len(maps)):
      store_lib.check_map(maps[index], index)
    return None
  pixels = region.prepare(maps, masks)
  for index in np.flatnonzero(pixels.defective & (labels == 0)):
    raise ValueError(
      f'image {index} has label 0 (good) but {pixels.areas[index].sum()} '
      'defect pixels in its mask'
    )
  return pixels


def _image_reasons(found, labels):
  if labels.all():
    reason = 'no good images' if labels.size else 'no images'
  elif not labels.any():
    reason = 'no defective images'
  else:
    return {}
  return dict.fromkeys(found, reason)


def _pixel_metrics(pixels, pro_limits):
  """Ranking metrics and AU-PRO of the pixels, and why some are undefined."""
  sums = ranking.RankingSums(pixels.positives, pixels.negatives)
  pro = region.ProSums(pro_limits, pixels.negatives)
  names = [*_named('pixel', [np.nan] * 4), *map(pro_key, pro_limits)]
  if not pixels.positives or not pixels.negatives:
    reason = 'no defect pixels in the masks'
    if pixels.positives:
      reason = 'no anomaly-free pixels in the masks'
    nan = float('nan')
    return dict.fromkeys(names, nan), dict.fromkeys(names, reason)
  for block in pixels.steps(pixels.region_weights()):
    sums.add(block)
    pro.add(block)
  values = [*sums.result(), *pro.result()]
  return dict(zip(names, values, strict=True)), {}


def _extra_metrics(pixels, normal, extra):
  """AUPIMO and per-image PRO, why undefined, and the latter per image."""
  found, reasons, values = {}, {}, None
  defective = np.flatnonzero(pixels.defective)
  if 'aupimo' in extra:
    reason = region.aupimo_undefined(pixels, normal)
    found['aupimo'] = float('nan')
    if reason:
      reasons['aupimo'] = reason
    else:
      scores = region.aupimo(pixels, normal=normal)
      found['aupimo'] = float(np.mean(scores[defective]))
  if 'pro_per_image' in extra:
    values = region.pro_per_image(pixels)
    found['pro_per_image'] = float('nan')
    failed = defective[np.isnan(values[defective])]
    if not len(defective):
      reasons['pro_per_image'] = 'no defect pixels in the masks'
    elif len(failed):
      reasons['pro_per_image'] = (
        f'its definition divides by zero on image {failed[0]}: constant map or '
        'no false positives'
      )
    else:
      found['pro_per_image'] = float(np.mean(values[defective]))
  return found, reasons, values


def _confidence(found, pixels, scores, labels, limits, values, draws, seed):
  """{metric: [low, high]} of every metric but the thresholds."""
  weights = bootstrap_lib.draw(labels, draws, seed)
  exact = {
    name: value
    for name, value in found.items()
    if isinstance(value, float) and not name.endswith('threshold')
  }
  known = {name: v for name, v in exact.items() if not np.isnan(v)}
  spans = {name: [float('nan')] * 2 for name in exact}
  if 'image_auroc' in known:
    tallies = bootstrap_lib.tally_scores(scores, labels)
    measure = functools.partial(_measure, 'image', tallies, limits, None)
    spans.update(bootstrap_lib.intervals(measure, weights, known))
  if pixels is not None and pixels.positives and pixels.negatives:
    tallies = bootstrap_lib.tally_pixels(pixels, labels == 0)
    measure = functools.partial(_measure, 'pixel', tallies, limits, values)
    spans.update(bootstrap_lib.intervals(measure, weights, known))
  return {name: spans[name] for name in exact}


def _measure(prefix, tallies, limits, values, weights):
  """{metric: (B,)} of (B, N) weights, for `bootstrap.intervals`."""
  ranked = bootstrap_lib.measure_ranking(tallies, weights)
  found = {f'{prefix}_{name}': value for name, value in ranked.items()}
  if tallies.overlap is None:
    return found
  pros, found['aupimo'] = bootstrap_lib.measure_regions(
    tallies, weights, limits
  )
  found.update(zip(map(pro_key, limits), pros, strict=True))
  if values is not None:
    used = weights * (tallies.regions > 0)
    found['pro_per_image'] = used @ np.nan_to_num(values) / used.sum(axis=1)
  return found


def precision_recall_f1(scores, labels, threshold):
  """Precision, recall and F1 of the decision "score >= threshold".

  Args:
    scores: numbers of any shape, or a sequence of arrays of any shapes, or a
      `MapStore` with labels None.
    labels: the same shapes, in {0, 1}.
    threshold: the threshold, compared in float64.

  Returns:
    {'precision', 'recall', 'f1'}: fractions; NaN where undefined: precision if
    nothing reaches the threshold, recall without positives, F1 if both.

  Raises:
    ValueError: on shapes that disagree, other labels, non-finite scores.
  """
  if isinstance(scores, store_lib.MapStore):
    scores, labels = scores.maps, scores.masks
  if len(scores) != len(labels):
    raise ValueError(f'there are {len(scores)} scores and {len(labels)} labels')
  if len(scores) and np.ndim(scores[0]) == 0:
    scores, labels = [scores], [labels]
  tp = fp = positives = 0
  for index in range(len(scores)):
    part = store_lib.check_scores(scores[index], f'scores[{index}]')
    truth = store_lib.check_mask(labels[index], part.shape, index) > 0
    found = part >= np.float64(threshold)
    hits = int(np.count_nonzero(found & truth))
    tp += hits
    fp += int(np.count_nonzero(found)) - hits
    positives += int(np.count_nonzero(truth))
  return {
    'precision': tp / (tp + fp) if tp + fp else math.nan,
    'recall': tp / positives if positives else math.nan,
    'f1': 2 * tp / (tp + fp + positives) if tp + fp + positives else math.nan,
  }


def write_tables(rows, directory):
  """Writes results.json, results.csv and results.md, each at once or not.

  The mean row is the plain mean over categories; it is left empty where one of
  them is undefined, since a mean over fewer does not compare, and for
  thresholds and settings.

  Args:
    rows: {category: metrics}, metrics as of `compute`, with any further
      numbers, texts and dicts. Numbers of the nested dicts `maps_mean`,
      `at_threshold`, `native` and `model` get columns such as
      maps_mean/pixel_auroc, those of `confidence` pixel_auroc_low and
      pixel_auroc_high. Other dicts and lists only
      go to results.json.
    directory: the folder, made if missing.

  Returns:
    The Markdown table: `TABLE_COLUMNS`, per cent with two decimals. The other
    two files hold everything, in full precision; NaN is null or empty.

  Raises:
    ValueError: without rows, or if a category is named 'mean'.
  """
  if not rows:
    raise ValueError('there are no rows to write')
  if 'mean' in rows:
    raise ValueError("a category cannot be named 'mean': that row is computed")
  flat = {category: flatten(metrics) for category, metrics in rows.items()}
  columns = _columns(flat.values())
  flat['mean'] = _mean_row(list(flat.values()), columns)
  document = {**rows, 'mean': _nest(flat['mean'])}
  write_json(os.path.join(directory, 'results.json'), document)
  out = io.StringIO()
  table = csv.writer(out, lineterminator='\n')
  table.writerow(['category', *columns])
  for category, row in flat.items():
    cells = [_plain(row.get(column)) for column in columns]
    table.writerow([category, *('' if c is None else c for c in cells)])
  storage.write_text(os.path.join(directory, 'results.csv'), out.getvalue())
  markdown = _markdown(flat)
  storage.write_text(os.path.join(directory, 'results.md'), markdown)
  return markdown


def format_table(rows):
  """The Markdown table of `write_tables`, with nothing written."""
  flat = {category: flatten(metrics) for category, metrics in rows.items()}
  return _markdown(flat)


def write_json(path, document):
  """Writes a document at once or not at all; NaN and infinity become null."""
  storage.write_text(path, json.dumps(_plain(document), indent=2) + '\n')


def flatten(metrics):
  """One row: numbers, texts, those of nested dicts, ends of the intervals.

  None, which is what NaN becomes in a file, is NaN again.
  """
  row = {k: v for k, v in metrics.items() if _is_cell(v)}
  for outer in _NESTED:
    for key, value in (metrics.get(outer) or {}).items():
      if _is_cell(value):
        row[f'{outer}/{key}'] = value
  row = {k: math.nan if v is None else v for k, v in row.items()}
  for key, (low, high) in metrics.get('confidence', {}).items():
    row[f'{key}_low'], row[f'{key}_high'] = low, high
  return row


def _nest(row):
  """The inverse of `flatten` for the mean row's metrics."""
  nested = {k: v for k, v in row.items() if '/' not in k}
  for key, value in row.items():
    if '/' in key:
      outer, inner = key.split('/', 1)
      nested.setdefault(outer, {})[inner] = value
  return nested


def _is_cell(value):
  return value is None or isinstance(value, (bool, int, float, str, np.generic))


def _columns(rows):
  """Known metrics first, then those of maps_mean, then any other."""
  seen = dict.fromkeys(key for row in rows for key in row)
  seen.pop('category', None)  # It is the first column.
  known = [*METRICS, *(f'maps_mean/{name}' for name in METRICS)]
  return [k for k in known if k in seen] + [k for k in seen if k not in known]


def _is_fraction(column):
  """Whether a column is a metric between 0 and 1."""
  name = column.split('/')[-1]
  if name.endswith('threshold') and '_at_' not in name:
    return False
  words = {'auroc', 'ap', 'f1', 'precision', 'recall'}
  kinds = ('au_pro', 'aupimo', 'pro_per_image', 'spro')
  return name.startswith(kinds) or not words.isdisjoint(name.split('_'))


def _mean_row(rows, columns):
  mean = {}
  for column in columns:
    values = [row.get(column) for row in rows]
    if _is_fraction(column) and not column.endswith(('_low', '_high')):
      values = [math.nan if v is None else float(v) for v in values]
      mean[column] = float(np.mean(values))
  return mean


def _markdown(flat):
  """The table as Markdown, intervals in brackets after their metric."""
  present = {column for row in flat.values() for column in row}
  columns = [column for column in TABLE_COLUMNS if column in present]
  lines = [
    '| ' + ' | '.join(['category', *columns]) + ' |',
    '|' + '---|' + '---:|' * len(columns),
  ]
  for category, row in flat.items():
    cells = [_cell(row, column) for column in columns]
    cells.insert(0, category.replace('|', '\\|'))
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _cell(row, column):
  """Per cent with two decimals, and the interval where there is one."""
  ends = [_plain(row.get(column + end)) for end in ('', '_low', '_high')]
  value, low, high = (None if end is None else 100 * end for end in ends)
  if value is None:
    return ''
  if low is None or high is None:
    return f'{value:.2f}'
  return f'{value:.2f} [{low:.2f}, {high:.2f}]'


def _plain(value):
  """Plain Python values for JSON: no numpy, None for NaN and infinity."""
  if isinstance(value, dict):
    return {str(key): _plain(inner) for key, inner in value.items()}
  if isinstance(value, np.ndarray):
    return _plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [_plain(inner) for inner in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
