"""The files that an evaluation writes for the report: scores.csv and a zip.

`scores.csv` has a row per test image, for people and other programs.
`report_data.zip` holds what a page cannot compute: thumbnails, maps of 8 bits
(grey, a third of the size of coloured ones; for display, never for figures),
outlines as vector paths, and the curves of the pixels. One file rather than
thousands, for network disks; its members are compressed images already and are
stored as they are, so that any of them can be read without the others and
neither side holds more than one.

Synopsis:

  archive.write(folder, config.data.root, records, scores, store,
                thumbnails, calibration)
  rows = archive.read_scores(folder)
  pictures = archive.open_archive(folder)
"""

from collections.abc import Mapping, Sequence
import csv
import io
import json
import math
import os
from typing import Any
import zipfile

import contourpy
import numpy as np
from PIL import features
from PIL import Image

from dmdd_jax import storage
from dmdd_jax.data import files
from dmdd_jax.data import records as records_lib
from dmdd_jax.metrics import region
from dmdd_jax.metrics import store as store_lib
from dmdd_jax.report import overlays
from dmdd_jax.scoring import calibration as calibration_lib

SCORES, ARCHIVE = 'scores.csv', 'report_data.zip'
FIELDS = ('file', 'defect', 'label', 'score', 'maps_mean_score', 'verdict')
# Outlines are drawn on a square of this side, half a pixel of a thumbnail.
OUTLINE_SIDE = 512
_THUMBNAIL = 256
_FORMAT = 'webp' if features.check('webp') else 'jpeg'
_CURVE_POINTS = 400


def encode_image(image: np.ndarray) -> np.ndarray:
  """A thumbnail of (H, W, 3) or (H, W) uint8 as the (n,) bytes of a file."""
  picture = Image.fromarray(image)
  if max(picture.size) > _THUMBNAIL:
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
  data = io.BytesIO()
  options = {'method': 2} if _FORMAT == 'webp' else {}
  picture.save(data, _FORMAT, quality=75, **options)
  return np.frombuffer(data.getvalue(), np.uint8)


def write(
  folder: str | os.PathLike,
  root: str,
  records: Sequence[records_lib.Record],
  scores: Mapping[str, np.ndarray],
  store: store_lib.MapStore,
  thumbnails: Sequence[np.ndarray],
  calibration: calibration_lib.Calibration,
) -> None:
  """Writes `scores.csv` and `report_data.zip`, each at once or not at all.

  Args:
    folder: the category's folder, made if missing.
    root: of the data; files are named relative to it.
    records: the N test images.
    scores: (N,) of `map` and of `maps_mean`.
    store: N maps and masks.
    thumbnails: N of `encode_image`.
    calibration: its thresholds are outlined and decide the verdicts.
  """
  names = _relative([record.image for record in records], root)
  rows = [
    {
      'file': name,
      'defect': record.defect,
      'label': record.label,
      'score': float(score),
      'maps_mean_score': float(control),
      'verdict': calibration.verdict(float(score)),
    }
    for name, record, score, control in zip(
      names, records, scores['map'], scores['maps_mean'], strict=True
    )
  ]
  text = io.StringIO()
  table = csv.DictWriter(text, FIELDS, lineterminator='\n')
  table.writeheader()
  table.writerows(rows)
  storage.write_text(os.path.join(folder, SCORES), text.getvalue())
  path = os.path.join(folder, ARCHIVE)
  with storage.writing(path) as file, zipfile.ZipFile(file, 'w') as archive:
    _fill(archive, names, records, store, thumbnails, calibration)


def read_scores(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of `scores.csv`, with numbers; none where there is no file.

  Raises:
    ValueError: the file is not what `write` writes; it is named.
  """
  path = os.path.join(folder, SCORES)
  if not storage.path(path).exists():
    return []
  try:
    content = storage.path(path).read_bytes()
    text = content.decode('utf-8', 'surrogateescape')
    return [
      {
        **row,
        'label': int(row['label']),
        'score': float(row['score']),
        'maps_mean_score': float(row['maps_mean_score']),
      }
      for row in csv.DictReader(io.StringIO(text, newline=''))
    ]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{path} is no table of {", ".join(FIELDS)}: {error!r}'
    ) from error


class Archive:
  """Reads `report_data.zip`.

  Attributes:
    items: N dicts: `file`; `prediction` and `truth`, outlines as paths of SVG,
      or None; `overlap`, their intersection over union in [0, 1], or None.
    curves: {'pixel_roc': (x, y), 'pro': (x, y)} or empty.
    colors: lower and upper end of the maps' colours.
    mime: of the images.
  """

  def __init__(self, path: str):
    self._file = storage.path(path).open('rb')
    self._zip = zipfile.ZipFile(self._file)
    document = json.loads(self._zip.read('report.json'))
    self.items, self.curves = document['items'], document['curves']
    self.colors, self.mime = document['colors'], document['mime']
    for item in self.items:
      if 'found' in item:  # The name in archives of before 2026-11-29.
        item['prediction'] = item.pop('found')

  def read(self, index: int) -> tuple[bytes, bytes]:
    """The files of an image's thumbnail and of its map."""
    return (
      self._zip.read(f'images/{index:05d}.{_suffix(self.mime)}'),
      self._zip.read(f'maps/{index:05d}.{_suffix(self.mime)}'),
    )

  def close(self) -> None:
    """Closes the file."""
    self._zip.close()
    self._file.close()


def open_archive(folder: str | os.PathLike) -> Archive | None:
  """Opens the folder's `report_data.zip`; None where there is none.

  Raises:
    ValueError: it cannot be read; it is named.
  """
  path = os.path.join(folder, ARCHIVE)
  if not storage.path(path).exists():
    return None
  try:
    return Archive(path)
  except (zipfile.BadZipFile, KeyError, ValueError) as error:
    raise ValueError(
      f'{path} cannot be read ({error}); evaluate again (--mode evaluate)'
    ) from error


def outline(values: np.ndarray, level: float) -> str:
  """The contour of (H, W) values at a level as an SVG path, '' without one.

  The path is closed along the borders and drawn on a square of OUTLINE_SIDE.
  """
  values = np.asarray(values, np.float32)
  low = float(values.min())
  if not low < level <= values.max():
    if not level <= low:  # NaN too: nothing reaches it.
      return ''
    side = OUTLINE_SIDE
    return f'M0 0h{side}v{side}h-{side}z'
  values = np.pad(values, 1, constant_values=low)
  lines = contourpy.contour_generator(z=values).lines(level)
  scale = OUTLINE_SIDE / np.array([values.shape[1] - 2, values.shape[0] - 2])
  paths = []
  for line in lines:
    points = np.round((np.asarray(line) - 0.5) * scale).astype(int)
    points = _corners(np.clip(points, 0, OUTLINE_SIDE))
    steps = ' '.join(f'{x} {y}' for x, y in np.diff(points, axis=0)[:-1])
    paths.append(f'M{points[0, 0]} {points[0, 1]}' + f'l{steps or "1 0"}z')
  return ''.join(paths)


def _corners(points: np.ndarray) -> np.ndarray:
  """Leaves out points of a closed line that lie on a straight one."""
  move = np.diff(points, axis=0)
  points = points[np.append(True, move.any(axis=1))]
  if len(points) < 4:
    return points
  move = np.diff(points, axis=0)
  turn = move[1:, 0] * move[:-1, 1] - move[1:, 1] * move[:-1, 0]
  return points[np.concatenate([[True], turn != 0, [True]])]


def _fill(
  archive: zipfile.ZipFile,
  names: Sequence[str],
  records: Sequence[records_lib.Record],
  store: store_lib.MapStore,
  thumbnails: Sequence[np.ndarray],
  calibration: calibration_lib.Calibration,
) -> None:
  """Writes the members: thumbnails, maps, and the rest in one document."""
  threshold = calibration.pixel_threshold
  low, high = overlays.color_range(store.maps, threshold)
  items = []
  for index, (name, record) in enumerate(zip(names, records, strict=True)):
    anomaly_map, mask = np.asarray(store.maps[index]), store.masks[index]
    shades = np.clip(
      (overlays.shrink_map(anomaly_map, _THUMBNAIL) - low) / (high - low),
      0.0,
      1.0,
    )
    shades = encode_image(np.round(shades * 255).astype(np.uint8))
    suffix = f'{index:05d}.{_FORMAT}'
    archive.writestr(f'images/{suffix}', thumbnails[index].tobytes())
    archive.writestr(f'maps/{suffix}', shades.tobytes())
    item = {'file': name, 'prediction': None, 'truth': None, 'overlap': None}
    if math.isfinite(threshold):
      item['prediction'] = outline(
        overlays.shrink_map(anomaly_map, _THUMBNAIL), threshold
      )
      item['overlap'] = _overlap(anomaly_map >= threshold, mask)
    if record.has_truth:
      item['truth'] = (
        outline(overlays.shrink_map(mask, _THUMBNAIL), 0.5)
        if mask.any()
        else ''
      )
    items.append(item)
  document = {
    'items': items,
    'curves': _curves(records, store),
    'colors': [low, high],
    'mime': f'image/{_FORMAT}',
  }
  archive.writestr('report.json', json.dumps(document), zipfile.ZIP_DEFLATED)


def _curves(
  records: Sequence[records_lib.Record], store: store_lib.MapStore
) -> dict[str, list[list[float]]]:
  """The curves of the pixels; none where the truth leaves them undefined."""
  if not all(record.has_truth for record in records):
    return {}
  pixels = region.prepare(store, None)
  if not pixels.positives or not pixels.negatives:
    return {}
  roc, pro = region.curves(pixels, points=_CURVE_POINTS)
  return {
    name: [[round(float(v), 6) for v in values] for values in curve]
    for name, curve in (('pixel_roc', roc), ('pro', pro))
  }


def _overlap(prediction: np.ndarray, mask: np.ndarray) -> float | None:
  """Intersection over union; None where the image has no defect."""
  if not mask.any():
    return None
  union = np.count_nonzero(prediction | (mask > 0))
  return round(np.count_nonzero(prediction & (mask > 0)) / union, 4)


def _relative(paths: Sequence[str], root: str) -> list[str]:
  """Paths relative to the root, with slashes; others as they are."""
  root = files.absolute(root) if root else ''
  if not root and paths:
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
  names = []
  for path in paths:
    inside = root and os.path.commonpath([root, path]) == root
    name = os.path.relpath(path, root) if inside else path
    names.append(name.replace(os.sep, '/'))
  return names


def _suffix(mime: str) -> str:
  return mime.removeprefix('image/')
