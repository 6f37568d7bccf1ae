"""All metrics of a test set in one call, and their tables.

Synopsis:

  metrics = results.compute(maps, masks, scores, labels)
  print(results.format_table({'screw': metrics}))
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import csv
import io
import json
import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from dmdd_jax.metrics import aupimo as aupimo_lib
from dmdd_jax.metrics import intervals as intervals_lib
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import region
from dmdd_jax.metrics import store as store_lib
from dmdd_jax.metrics import tallies

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

# Why image F1-max has no interval.
_CHOSEN = (
  'its threshold is chosen on these images, so it is too high, by an amount'
  ' that their spread does not show'
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
  maps: store_lib.MapStore | store_lib.Arrays | None,
  masks: store_lib.Arrays | None,
  scores: npt.ArrayLike,
  labels: npt.ArrayLike,
  *,
  pro_limits: Sequence[float] = (0.3, 0.05),
  extra: Collection[str] = _EXTRA,
  intervals: bool = True,
) -> dict[str, Any]:
  """Computes every metric of a test set, exactly.

  The definitions are those of `ranking.ranking` (AUROC, AP, F1-max),
  `region.au_pro`, `aupimo.aupimo` and `region.pro_per_image`. The last two are
  means over the defective images; AUPIMO's normal images are those of label 0.

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
    intervals: whether to add 95 % confidence intervals, by the spread over the
      images.

  Returns:
    {metric: float}, fractions in [0, 1] except the two thresholds. The keys are
    `image_` and `pixel_` + `auroc`, `ap`, `f1_max`, `f1_max_threshold`, and
    those of `pro_limits` and `extra`. An undefined metric is NaN, and then
    `undefined` is {metric: reason}. With intervals, `confidence` is
    {metric: [low, high]}, as `metrics.intervals` has them (thresholds have
    none). It is None where there is no interval, and then `no_interval` is
    {metric: reason}.

  Raises:
    ValueError: on NaN or infinite scores, shapes or counts that disagree, mask
      values or labels other than 0 and 1, defect pixels in an image of label
      0; the message names the image's index.
  """
  truth = store_lib.check_labels(labels)
  checked = _check_image_scores(scores, truth)
  _check_options(pro_limits, extra)
  pixels = _prepare(maps, masks, truth)
  metrics: dict[str, Any] = _named('image', ranking.ranking(checked, truth))
  reasons = _image_reasons(metrics, truth)
  if pixels is None:
    names = (*_named('pixel', [np.nan] * 4), *map(pro_key, pro_limits), *extra)
    reason = 'no maps' if maps is None else 'no masks'
    metrics.update(dict.fromkeys(names, float('nan')))
    reasons.update(dict.fromkeys(names, reason))
  else:
    measured, why = _pixel_metrics(pixels, pro_limits)
    metrics.update(measured)
    reasons.update(why)
  values = None
  if pixels is not None and extra:
    measured, why, values = _extra_metrics(pixels, truth == 0, extra)
    metrics.update(measured)
    reasons.update(why)
  if reasons:
    metrics['undefined'] = reasons
  if intervals:
    ends = _intervals(metrics, pixels, checked, truth, pro_limits, values)
    metrics['confidence'] = {
      name: None if isinstance(span, str) else list(span)
      for name, span in ends.items()
    }
    reasons = {k: v for k, v in ends.items() if isinstance(v, str)}
    if reasons:
      metrics['no_interval'] = reasons
  return metrics


def pro_key(limit: float) -> str:
  """The key of AU-PRO at an FPR limit: `au_pro` at 0.3, else `au_pro_005`."""
  return 'au_pro' if limit == 0.3 else 'au_pro_' + f'{limit:g}'.replace('.', '')


def _named(prefix: str, values: Iterable[float]) -> dict[str, float]:
  """{PREFIX_auroc, ...} of the four values of a `ranking.Ranking`."""
  return {f'{prefix}_{k}': v for k, v in zip(_RANKING, values, strict=True)}


def _check_image_scores(
  scores: npt.ArrayLike, labels: np.ndarray
) -> np.ndarray:
  """Returns (N,) finite float scores, or raises ValueError."""
  values = np.asanyarray(scores)
  if values.shape != labels.shape:
    raise ValueError(
      f'scores have shape {values.shape} and labels {labels.shape}; both must '
      'be (N,)'
    )
  for index in np.flatnonzero(~np.isfinite(values)):
    raise ValueError(
      f'the score of image {index} is {values[index]}; every score must be '
      'finite'
    )
  return store_lib.check_scores(values, 'scores')


def _check_options(pro_limits: Iterable[float], extra: Iterable[str]) -> None:
  """Raises ValueError, see `compute`."""
  for limit in pro_limits:
    if not 0 < limit <= 1:
      raise ValueError(f'pro_limits holds {limit}, expected values in (0, 1]')
  for name in extra:
    if name not in _EXTRA:
      raise ValueError(f'extra holds {name!r}, expected names out of {_EXTRA}')


def _prepare(
  maps: store_lib.MapStore | store_lib.Arrays | None,
  masks: store_lib.Arrays | None,
  labels: np.ndarray,
) -> region.Pixels | None:
  """Returns the checked `region.Pixels`, or None without maps or masks."""
  if maps is not None and len(maps) != len(labels):
    raise ValueError(f'there are {len(maps)} maps and {len(labels)} labels')
  if isinstance(maps, store_lib.MapStore):
    if masks is not None:
      raise ValueError('a MapStore brings its own masks; pass masks=None')
  elif maps is None:
    return None
  elif masks is None:
    for index in range(len(maps)):
      store_lib.check_map(maps[index], index)
    return None
  pixels = region.prepare(maps, masks)
  for index in np.flatnonzero(pixels.defective & (labels == 0)).tolist():
    raise ValueError(
      f'image {index} has label 0 (good) but {pixels.areas[index].sum()} '
      'defect pixels in its mask'
    )
  return pixels


def _image_reasons(names: Iterable[str], labels: np.ndarray) -> dict[str, str]:
  """{metric: reason} of the image metrics, {} if they are defined."""
  if labels.all():
    reason = 'no good images' if labels.size else 'no images'
  elif not labels.any():
    reason = 'no defective images'
  else:
    return {}
  return dict.fromkeys(names, reason)


def _pixel_metrics(
  pixels: region.Pixels, pro_limits: Sequence[float]
) -> tuple[dict[str, float], dict[str, str]]:
  """Ranking metrics and AU-PRO of the pixels; {metric: reason} if undefined."""
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


def _extra_metrics(
  pixels: region.Pixels, normal: np.ndarray, extra: Collection[str]
) -> tuple[dict[str, float], dict[str, str], np.ndarray | None]:
  """AUPIMO and per-image PRO.

  Returns:
    {metric: value}, {metric: reason} of the undefined ones, and (N,) the PRO of
    each image or None.
  """
  metrics: dict[str, float] = {}
  reasons: dict[str, str] = {}
  values = None
  defective = np.flatnonzero(pixels.defective)
  if 'aupimo' in extra:
    reason = aupimo_lib.aupimo_undefined(pixels, normal)
    metrics['aupimo'] = float('nan')
    if reason:
      reasons['aupimo'] = reason
    else:
      scores = aupimo_lib.aupimo(pixels, normal=normal)
      metrics['aupimo'] = float(np.mean(scores[defective]))
  if 'pro_per_image' in extra:
    values = region.pro_per_image(pixels)
    metrics['pro_per_image'] = float('nan')
    failed = defective[np.isnan(values[defective])]
    if not len(defective):
      reasons['pro_per_image'] = 'no defect pixels in the masks'
    elif len(failed):
      reasons['pro_per_image'] = (
        f'its definition divides by zero on image {failed[0]}: constant map or '
        'no false positives'
      )
    else:
      metrics['pro_per_image'] = float(np.mean(values[defective]))
  return metrics, reasons, values


def _intervals(
  metrics: Mapping[str, Any],
  pixels: region.Pixels | None,
  scores: np.ndarray,
  labels: np.ndarray,
  limits: Sequence[float],
  values: np.ndarray | None,
) -> dict[str, tuple[float, float] | str]:
  """{metric: its interval, or why there is none}, except the thresholds.

  Args:
    metrics: {metric: value} of the full set; `undefined` is read as well.
    pixels: of N images, or None without maps.
    scores: (N,) the images' scores.
    labels: (N,) in {0, 1}.
    limits: FPR limits of AU-PRO.
    values: (N,) `region.pro_per_image`, or None.
  """
  exact = {
    name: value
    for name, value in metrics.items()
    if isinstance(value, float) and not name.endswith('threshold')
  }
  ends: dict[str, tuple[float, float] | str] = dict(
    metrics.get('undefined', {})
  )
  group, kinds = tallies.groups(labels)
  if 'image_auroc' not in ends:
    positives = int(np.count_nonzero(labels))
    counts = tallies.tally_scores(scores, labels, group)
    ranked = tallies.measure_ranking(tallies.without_each(counts))
    ends['image_auroc'] = intervals_lib.auroc(
      exact['image_auroc'], positives, len(labels) - positives
    )
    ends['image_ap'] = intervals_lib.average_precision(
      exact['image_ap'], ranked['ap'], kinds
    )
    ends['image_f1_max'] = _CHOSEN
  if pixels is not None and 'pixel_auroc' not in ends:
    left_out = _without_each(pixels, labels, group, limits, values)
    for name, each in left_out.items():
      if name in exact and name not in ends:
        ends[name] = intervals_lib.jackknife(exact[name], each, kinds)
  return {name: ends[name] for name in exact}


def _without_each(
  pixels: region.Pixels,
  labels: np.ndarray,
  group: np.ndarray,
  limits: Sequence[float],
  values: np.ndarray | None,
) -> dict[str, np.ndarray]:
  """{metric of pixels: (G,) its values without each group of images}."""
  counts = tallies.tally_pixels(pixels, labels == 0, group)
  counts = tallies.without_each(counts)
  ranked = tallies.measure_ranking(counts)
  metrics = {f'pixel_{name}': each for name, each in ranked.items()}
  pros, metrics['aupimo'] = tallies.measure_regions(counts, limits)
  metrics.update(zip(map(pro_key, limits), pros, strict=True))
  if values is not None:
    known = np.nan_to_num(values)
    sums = known.sum() - np.bincount(group, known)
    with np.errstate(invalid='ignore'):
      metrics['pro_per_image'] = sums / counts.defective
  return metrics


def precision_recall_f1(
  scores: store_lib.MapStore | store_lib.Arrays | Sequence[float],
  labels: store_lib.Arrays | Sequence[float] | None,
  threshold: float,
) -> dict[str, float]:
  """Precision, recall and F1 of the decision "score >= threshold".

  Args:
    scores: numbers of any shape, or a sequence of arrays of any shapes, or a
      `MapStore` with labels None.
    labels: the same shapes, in {0, 1}.
    threshold: the threshold, compared in float64.

  Returns:
    {'precision', 'recall', 'f1'}, fractions. Precision is NaN if nothing
    reaches the threshold, recall without positives, F1 in both cases together.

  Raises:
    ValueError: on shapes that disagree, other labels, non-finite scores.
  """
  if isinstance(scores, store_lib.MapStore):
    labels = scores.masks
    scores = scores.maps
  if labels is None:
    raise ValueError('labels are None; only a MapStore brings its own')
  if len(scores) != len(labels):
    raise ValueError(f'there are {len(scores)} scores and {len(labels)} labels')
  if len(scores) and np.ndim(scores[0]) == 0:
    scores, labels = [np.asarray(scores)], [np.asarray(labels)]
  tp = fp = positives = 0
  for index in range(len(scores)):
    part = store_lib.check_scores(scores[index], f'scores[{index}]')
    truth = store_lib.check_mask(labels[index], part.shape, index) > 0
    above = part >= np.float64(threshold)
    hits = int(np.count_nonzero(above & truth))
    tp += hits
    fp += int(np.count_nonzero(above)) - hits
    positives += int(np.count_nonzero(truth))
  return {
    'precision': tp / (tp + fp) if tp + fp else math.nan,
    'recall': tp / positives if positives else math.nan,
    'f1': 2 * tp / (tp + fp + positives) if tp + fp + positives else math.nan,
  }


def format_tables(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
  """The results of all categories as JSON, CSV and Markdown.

  The mean row is the plain mean over all categories. It is empty for thresholds
  and settings, and where one category is undefined, because a mean over fewer
  categories does not compare.

  Args:
    rows: {category: metrics}, metrics as of `compute`, with any further
      numbers, texts and dicts. Numbers of the nested dicts `maps_mean`,
      `at_threshold`, `native`, `model` and `validation` get columns such as
      maps_mean/pixel_auroc, those of `confidence` pixel_auroc_low and
      pixel_auroc_high. Other dicts and lists go to results.json alone.

  Returns:
    {file name: text}, for `storage.write_texts`. results.md is the table of
    `format_table`. results.json and results.csv hold everything in full
    precision; NaN is null or empty.

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
  out = io.StringIO()
  table = csv.writer(out, lineterminator='\n')
  table.writerow(['category', *columns])
  for category, row in flat.items():
    cells = [plain(row.get(column)) for column in columns]
    table.writerow([category, *('' if c is None else c for c in cells)])
  return {
    'results.json': format_json(document),
    'results.csv': out.getvalue(),
    'results.md': _markdown(flat),
  }


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """The Markdown table: `TABLE_COLUMNS`, per cent with two decimals.

  Args:
    rows: {category: metrics}, as for `format_tables`; no mean row is added.
  """
  flat = {category: flatten(metrics) for category, metrics in rows.items()}
  return _markdown(flat)


def format_json(document: Any) -> str:
  """JSON with NumPy's numbers and arrays; NaN and infinity become null."""
  return json.dumps(plain(document), indent=2) + '\n'


def flatten(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """One row of a table: {column: number or text}.

  The columns are the metrics, those of nested dicts (maps_mean/pixel_auroc) and
  the ends of the intervals (pixel_auroc_low). None becomes NaN: `format_json`
  writes NaN as null.
  """
  row = {k: v for k, v in metrics.items() if _is_cell(v)}
  for outer in _NESTED:
    for key, value in (metrics.get(outer) or {}).items():
      if _is_cell(value):
        row[f'{outer}/{key}'] = value
  row = {k: math.nan if v is None else v for k, v in row.items()}
  for key, ends in metrics.get('confidence', {}).items():
    if ends is not None:
      row[f'{key}_low'], row[f'{key}_high'] = ends
  return row


def _nest(row: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten` for the mean row's metrics."""
  nested: dict[str, Any] = {k: v for k, v in row.items() if '/' not in k}
  for key, value in row.items():
    if '/' in key:
      outer, inner = key.split('/', 1)
      nested.setdefault(outer, {})[inner] = value
  return nested


def _is_cell(value: Any) -> bool:
  return value is None or isinstance(value, (bool, int, float, str, np.generic))


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
  """Known metrics first, then those of maps_mean, then any other."""
  seen = dict.fromkeys(key for row in rows for key in row)
  seen.pop('category', None)  # It is the first column.
  known = [*METRICS, *(f'maps_mean/{name}' for name in METRICS)]
  return [k for k in known if k in seen] + [k for k in seen if k not in known]


def _is_fraction(column: str) -> bool:
  """Whether a column is a metric between 0 and 1."""
  name = column.split('/')[-1]
  if name.endswith('threshold') and '_at_' not in name:
    return False
  words = {'auroc', 'ap', 'f1', 'precision', 'recall'}
  kinds = ('au_pro', 'aupimo', 'pro_per_image', 'spro')
  return name.startswith(kinds) or not words.isdisjoint(name.split('_'))


def _is_other_limit(column: str) -> bool:
  """Whether a column is AU-PRO or sPRO up to a rate that was asked for."""
  return re.fullmatch(r'(au_pro|spro)_\d+', column) is not None


def _mean_row(
  rows: Sequence[Mapping[str, Any]], columns: Iterable[str]
) -> dict[str, float]:
  """{column: mean over the rows} of the columns that are fractions."""
  mean = {}
  for column in columns:
    if _is_fraction(column) and not column.endswith(('_low', '_high')):
      cells = [row.get(column) for row in rows]
      values = [math.nan if cell is None else float(cell) for cell in cells]
      mean[column] = float(np.mean(values))
  return mean


def _markdown(flat: Mapping[str, Mapping[str, Any]]) -> str:
  """The table as Markdown, intervals in brackets after their metric."""
  present = {column for row in flat.values() for column in row}
  columns = [column for column in TABLE_COLUMNS if column in present]
  columns += sorted(filter(_is_other_limit, present - set(columns)))
  lines = [
    '| ' + ' | '.join(['category', *columns]) + ' |',
    '|' + '---|' + '---:|' * len(columns),
  ]
  for category, row in flat.items():
    cells = [_cell(row, column) for column in columns]
    cells.insert(0, category.replace('|', '\\|'))
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _cell(row: Mapping[str, Any], column: str) -> str:
  """Per cent with two decimals, and the interval where there is one."""
  ends = [plain(row.get(column + end)) for end in ('', '_low', '_high')]
  value, low, high = (None if end is None else 100 * end for end in ends)
  if value is None:
    return ''
  if low is None or high is None:
    return f'{value:.2f}'
  return f'{value:.2f} [{low:.2f}, {high:.2f}]'


def plain(value: Any) -> Any:
  """Plain Python values for JSON: no numpy, None for NaN and infinity."""
  if isinstance(value, dict):
    return {str(key): plain(inner) for key, inner in value.items()}
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [plain(inner) for inner in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
