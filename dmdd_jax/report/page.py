"""A run as one self-contained page: report.html.

Tables, curves, histograms and training curves are in the page as they stand;
the gallery of test images is drawn by the page's script, image by image as they
come near the screen. Nothing is loaded from anywhere: the page's content policy
forbids it. Every text that comes from a file's name is escaped.

Synopsis:

  path = report.write('runs/mvtec')            # of what is on disk
  report.try_write(workdir, category_folders)  # after an evaluation
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import html
import importlib.resources
import json
import math
import os
import re
from typing import Any

from absl import logging
from etils import epath
import matplotlib
import numpy as np

from dmdd_jax import storage
from dmdd_jax.metrics import ranking
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.report import archive as archive_lib
from dmdd_jax.report import charts
from dmdd_jax.report import published
from dmdd_jax.scoring import calibration as calibration_lib

NAME = 'report.html'
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


@dataclasses.dataclass(frozen=True)
class Category:
  """What is on disk of one category.

  Attributes:
    name: of the category.
    results: of results.json.
    rows: of scores.csv, none where there is no such file.
    archive: the thumbnails and curves, or None.
    scalars: {tag: (steps, values)} of TensorBoard's event files.
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
    return self.count(1, calibration_lib.GOOD)

  @property
  def alarms(self) -> int:
    """Good images that were called defective."""
    return self.count(0, calibration_lib.DEFECTIVE)


def try_write(
  workdir: str | os.PathLike,
  folders: Sequence[str | os.PathLike],
  training: Sequence[str | os.PathLike] | None = None,
) -> str | None:
  """`write`, where a failure is logged: results are worth more than a page."""
  try:
    path = write(workdir, folders, training)
  except Exception:
    logging.exception('%s was not written', os.path.join(workdir, NAME))
    return None
  logging.info('report in %s', path)
  return path


def write(
  workdir: str | os.PathLike,
  folders: Sequence[str | os.PathLike] | None = None,
  training: Sequence[str | os.PathLike] | None = None,
) -> str:
  """Writes report.html from the results on disk; returns its path.

  Args:
    workdir: gets the page.
    folders: of the categories' results; by default the workdir itself or the
      folders in it.
    training: where the event files of each lie, if not with the results.

  Raises:
    FileNotFoundError: there are no results.
    ValueError: a file cannot be read; it is named.
  """
  folders = find_folders(workdir) if folders is None else folders
  categories = [
    _read(folder, events)
    for folder, events in zip(folders, training or folders, strict=True)
  ]
  try:
    text = _page(storage.absolute(workdir), categories)
  finally:
    for category in categories:
      if category.archive is not None:
        category.archive.close()
  path = os.path.join(workdir, NAME)
  storage.write_text(path, text)
  return path


def find_folders(workdir: str | os.PathLike) -> list[str]:
  """The folders that hold a category's results: this one, or those in it.

  Raises:
    FileNotFoundError: there are none.
  """
  workdir = os.fspath(workdir)
  inside = storage.folders(workdir, 'results.json')
  if storage.path(os.path.join(workdir, 'results.json')).exists():
    inside.insert(0, workdir)
  found = [
    folder
    for folder in inside
    if 'calibration' in _read_json(os.path.join(folder, 'results.json'))
  ]
  if not found:
    raise FileNotFoundError(
      f'{workdir} holds no results.json of a category, nor do the folders in'
      ' it: name the folder of a run, or evaluate it first (--mode evaluate)'
    )
  return found


def read_scalars(
  folder: str | os.PathLike,
) -> dict[str, tuple[list[int], list[float]]]:
  """{tag: (steps, values)} of a folder's event files, by ascending step.

  Of a step that was logged twice (a run that went on) the last value counts.
  A file that breaks off is read as far as it goes.
  """
  from tensorboard.util import tensor_util

  found: dict[str, dict[int, float]] = {}
  for path in _event_files(folder):
    for event in _events(path):
      for value in event.summary.value:
        plugin = value.metadata.plugin_data.plugin_name
        if value.HasField('simple_value'):
          number = value.simple_value
        elif plugin == 'scalars':
          number = tensor_util.make_ndarray(value.tensor).item()
        else:
          continue
        found.setdefault(value.tag, {})[event.step] = float(number)
  ordered = {tag: sorted(points.items()) for tag, points in found.items()}
  return {
    tag: ([step for step, _ in points], [number for _, number in points])
    for tag, points in ordered.items()
  }


def _event_files(folder: str | os.PathLike) -> list[epath.Path]:
  """From the oldest to the newest."""
  if not storage.path(folder).is_dir():
    return []
  found = [p for p in storage.path(folder).iterdir() if '.tfevents.' in p.name]
  return sorted(found, key=lambda path: path.stat().mtime)


def _events(path: epath.Path) -> Iterator[Any]:
  """The events of a file, as far as it goes."""
  # TensorBoard's own reader, without TensorFlow, which takes seconds to import.
  from tensorboard.compat.proto import event_pb2
  from tensorboard.compat.tensorflow_stub import errors
  from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

  with storage.local_copy(path) as name:
    reader = pywrap_tensorflow.PyRecordReader_New(name)
    while True:
      try:
        reader.GetNext()
      except (errors.OutOfRangeError, errors.DataLossError):
        return
      yield event_pb2.Event.FromString(reader.record())


def _read(folder: str | os.PathLike, events: str | os.PathLike) -> Category:
  """Reads a category's folder; what only adorns may be missing."""
  results = _read_json(os.path.join(folder, 'results.json'))
  rows = archive_lib.read_scores(folder)
  archive = archive_lib.open_archive(folder)
  if archive is not None and (
    [item['file'] for item in archive.items] != [row['file'] for row in rows]
  ):
    logging.warning(
      '%s: %s and %s are not of the same evaluation; no gallery is made',
      folder,
      archive_lib.SCORES,
      archive_lib.ARCHIVE,
    )
    archive.close()
    archive = None
  try:
    scalars = read_scalars(events)
  except Exception:
    logging.exception('%s: the event files cannot be read', events)
    scalars = {}
  return Category(results['category'], results, rows, archive, scalars)


def _read_json(path: str) -> dict[str, Any]:
  try:
    return json.loads(storage.path(path).read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error


def _page(workdir: str, categories: Sequence[Category]) -> str:
  """The page's text."""
  package = importlib.resources.files('dmdd_jax.report')
  template = (package / 'page.html').read_text('utf-8')
  script = re.search(r'<script>(.*?)</script>', template, re.DOTALL)[1]
  digest = hashlib.sha256(script.encode()).digest()
  names = [category.name for category in categories]
  title = names[0] if len(names) == 1 else os.path.basename(workdir)
  gallery, chunks = _gallery(categories)
  parts = {
    'title': html.escape(title),
    'script_hash': base64.b64encode(digest).decode(),
    'provenance': _provenance(categories),
    'tiles': _tiles(categories),
    'results': _results_table(categories),
    'anchors': anchors_table(categories),
    'categories': '\n'.join(_sections(categories)),
    'colors': _color_tables(),
    'gradient': _gradient(),
    'gallery': _script_json(gallery),
    'chunks': chunks,
  }
  # One pass: what is put in is never searched again.
  return re.sub(r'\{\{(\w+)\}\}', lambda m: parts[m[1]], template)


def _provenance(categories: Sequence[Category]) -> str:
  """What the results came from, as items of a list."""
  found: dict[str, list[Any]] = {}
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
      if value not in (None, '', *found.get(name, ())):
        found.setdefault(name, []).append(value)
  found['finished'] = sorted(found.get('finished', ()))[-1:]
  return ''.join(
    f'<li><span>{html.escape(name)}</span> '
    + html.escape(', '.join(map(str, values[:3])))
    + (', ...' if len(values) > 3 else '')
    + '</li>'
    for name, values in found.items()
    if values
  )


def _tiles(categories: Sequence[Category]) -> str:
  """The few figures to see first."""
  rows = [results_lib.flatten(c.results) for c in categories]
  prefix = 'mean ' if len(rows) > 1 else ''
  tiles = [
    (prefix + name, _percent(_mean([row.get(key) for row in rows])), '')
    for name, key in (
      ('image AUROC', 'image_auroc'),
      ('pixel AUROC', 'pixel_auroc'),
      ('AU-PRO', 'au_pro'),
    )
  ]
  if all(c.rows and c.calibration.images for c in categories):
    for name, label, wrong in (
      ('missed', 1, sum(c.missed for c in categories)),
      ('false alarms', 0, sum(c.alarms for c in categories)),
    ):
      total = sum(c.count(label) for c in categories)
      kind = 'defective' if label else 'good'
      tiles.append((name, str(wrong), f'of {total} {kind}'))
  return ''.join(
    f'<div class="tile"><dt>{name}</dt><dd>{value}'
    f'<small>{note or "%"}</small></dd></div>'
    for name, value, note in tiles
  )


def _results_table(categories: Sequence[Category]) -> str:
  """The table of this run: a row per category, and their mean."""
  rows = [(c.name, results_lib.flatten(c.results), c) for c in categories]
  groups: dict[str, int] = {}
  for group, _, _ in _COLUMNS:
    groups[group] = groups.get(group, 0) + 1
  spans = ''.join(
    f'<th colspan="{count}" scope="colgroup">{group}</th>'
    for group, count in groups.items()
  )
  heads = ''.join(f'<th scope="col">{head}</th>' for _, head, _ in _COLUMNS)
  body = ''.join(_results_row(*row) for row in rows)
  if len(rows) > 1:
    mean = {
      key: _mean([row.get(key) for _, row, _ in rows]) for _, _, key in _COLUMNS
    }
    body += _results_row('mean', mean, None)
  return (
    '<table><thead><tr><th></th><th colspan="2" scope="colgroup">test images'
    f'</th><th colspan="2" scope="colgroup">verdicts</th>{spans}</tr>'
    '<tr><th scope="col">category</th><th scope="col">good</th>'
    '<th scope="col">defective</th><th scope="col">missed</th>'
    f'<th scope="col">false alarms</th>{heads}</tr></thead>'
    f'<tbody>{body}</tbody></table>'
  )


def _results_row(
  name: str, row: Mapping[str, Any], category: Category | None
) -> str:
  reasons = category.results.get('undefined', {}) if category else {}
  cells = []
  for _, _, key in _COLUMNS:
    low, high = row.get(f'{key}_low'), row.get(f'{key}_high')
    text = _percent(row.get(key))
    if None not in (low, high):
      text += f'<small>{_percent(low)} to {_percent(high)}</small>'
    why = html.escape(str(reasons.get(key, '')), quote=True)
    title = f' title="{why}"' if why else ''
    cells.append(f'<td{title}>{text}</td>')
  counts = ['', '', '', '']
  if category is not None and category.rows:
    counts[:2] = [category.count(0), category.count(1)]
    if category.calibration.images:
      counts[2:] = [category.missed, category.alarms]
  kind = ' class="mean"' if category is None else ''
  return (
    f'<tr{kind}><th scope="row">{html.escape(name)}</th>'
    + ''.join(f'<td>{count}</td>' for count in counts)
    + ''.join(cells)
    + '</tr>'
  )


def anchors_table(categories: Sequence[Category]) -> str:
  """This run beside the numbers of others, by category and over all 15.

  A mean stands beside theirs only where the run has all of MVTec AD.
  """
  own = {c.name: results_lib.flatten(c.results) for c in categories}
  whole = set(published.MVTEC_AD) <= set(own)
  blocks = [name for name in own if name in published.PER_CATEGORY]
  blocks.append(published.MEAN)
  if whole:
    rows = [own[name] for name in published.MVTEC_AD]
    own[published.MEAN] = {
      key: _mean([row.get(key) for row in rows]) for key in published.KEYS
    }
  heads = ''.join(
    f'<th colspan="3" scope="colgroup">{html.escape(name)}</th>'
    for name in blocks
  )
  names = '<th scope="col">image AUROC</th><th scope="col">pixel AUROC</th>'
  names += '<th scope="col">PRO</th>'
  body = _anchor_row('this run', [own.get(name) for name in blocks], _OWN)
  for anchor in published.ANCHORS:
    found = [anchor.figures.get(name) for name in blocks]
    found = [f and dict(zip(published.KEYS, f, strict=True)) for f in found]
    body += _anchor_row(anchor.name, found, anchor.differs)
  return (
    f'<table class="anchors"><thead><tr><th></th>{heads}<th></th></tr>'
    f'<tr><th scope="col">method</th>{names * len(blocks)}'
    '<th scope="col" class="text">what differs</th></tr></thead>'
    f'<tbody>{body}</tbody></table>'
  )


def _anchor_row(
  name: str, blocks: Sequence[Mapping[str, float] | None], note: str
) -> str:
  kind = 'theirs' if name in published.NAMES else 'own'
  # Theirs with as many digits as were published.
  digits = '.4g' if kind == 'theirs' else '.2f'
  cells = ''.join(
    f'<td>{_percent((block or {}).get(key), digits)}</td>'
    for block in blocks
    for key in published.KEYS
  )
  return (
    f'<tr class="{kind}"><th scope="row">{html.escape(name)}</th>{cells}'
    f'<td class="text">{html.escape(note)}</td></tr>'
  )


def _sections(categories: Sequence[Category]) -> Iterator[str]:
  """Each category's charts, to fold away where there are many."""
  for category in categories:
    row = results_lib.flatten(category.results)
    figures = ', '.join(
      f'{name} {_percent(row.get(key))}'
      for name, key in (
        ('image AUROC', 'image_auroc'),
        ('pixel AUROC', 'pixel_auroc'),
        ('AU-PRO', 'au_pro'),
      )
    )
    drawn = [*_score_charts(category), *_pixel_charts(category)]
    drawn += _training_charts(category.scalars)
    if not drawn:
      drawn = ['<p>Nothing to draw is on disk for this category.</p>']
    notes = ''
    if category.archive is None:
      notes = (
        '<p class="note">No data for curves and gallery are on disk:'
        ' evaluate again (<code>--mode evaluate</code>).</p>'
      )
    is_open = ' open' if len(categories) <= 2 else ''
    yield (
      f'<details class="category"{is_open}><summary><b>'
      f'{html.escape(category.name)}</b> <span>{figures}</span></summary>'
      f'{notes}<div class="charts">{"".join(drawn)}</div></details>'
    )


def _score_charts(category: Category) -> Iterator[str]:
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
    drawn = []
    for name, key in (
      ('final map', 'score'),
      ('mean of maps', 'maps_mean_score'),
    ):
      scores = np.array([row[key] for row in category.rows])
      labels = np.array([row['label'] for row in category.rows])
      drawn.append(charts.Line(name, *ranking.roc_curve(scores, labels)))
    yield charts.lines(
      'ROC of the images',
      drawn,
      x_label='false-positive rate',
      y_label='true-positive rate',
      x_range=(0, 1),
      y_range=(0, 1),
      diagonal=True,
    )


def _roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
  """Every corner of the ROC curve; ties are one straight line."""
  order = np.argsort(-scores, kind='stable')
  last = np.append(np.diff(scores[order]) != 0, True)
  hits, alarms = np.cumsum(labels[order]), np.cumsum(1 - labels[order])
  return tuple(
    np.append(0.0, count[last] / max(1, count[-1])) for count in (alarms, hits)
  )


def _pixel_charts(category: Category) -> Iterator[str]:
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


def _gallery(categories: Sequence[Category]) -> tuple[dict[str, Any], str]:
  """What the script needs: texts and numbers, and the images' data beside."""
  document: dict[str, Any] = {'chunk': _CHUNK, 'categories': [], 'items': []}
  lines = []
  for index, category in enumerate(categories):
    archive, calibration = category.archive, category.calibration
    if archive is None:
      continue
    threshold = calibration.image_threshold
    if math.isnan(threshold):  # To sort by alone; there are no verdicts.
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
      # '-' is an outline that is not known, as against one that is empty.
      outlines = (
        '-' if p is None else p for p in (item['found'], item['truth'])
      )
      lines.append('|'.join((image, shades, *outlines)))
  chunks = [
    f'<script type="text/plain" id="chunk-{start // _CHUNK}">'
    + '\n'.join(lines[start : start + _CHUNK])
    + '</script>'
    for start in range(0, len(lines), _CHUNK)
  ]
  return document, '\n'.join(chunks)


def _script_json(document: Mapping[str, Any]) -> str:
  """JSON that cannot end the script element that it stands in."""
  text = json.dumps(document, separators=(',', ':'))
  return re.sub('[<>&]', lambda m: f'\\u{ord(m[0]):04x}', text)


def _color_tables() -> str:
  """The colours of the maps as the transfer functions of an SVG filter."""
  table = matplotlib.colormaps['turbo'](np.linspace(0, 1, 33))
  return ''.join(
    f'<feFunc{channel} type="table" tableValues="'
    + ' '.join(f'{v:.3f}' for v in table[:, i])
    + '"/>'
    for i, channel in enumerate('RGB')
  )


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


def _percent(value: float | None, digits: str = '.2f') -> str:
  """Per cent; a dash where it is not known."""
  if value is None or not math.isfinite(value):
    return '<span class="none">–</span>'
  return f'{100 * value:{digits}}'
