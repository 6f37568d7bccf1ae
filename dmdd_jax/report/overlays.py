"""Pictures: test images with map, outline and ground truth, one scale a run.

A picture costs as much as it shows: image and map are shrunk first, so that a
photograph of 100 megapixels is drawn as fast as one of half a megapixel.

Synopsis:

  failures = overlays.write_overlays('runs/demo/pictures', records, maps,
                                     scores, calibration, per_group=4)
"""

from collections.abc import Sequence
import functools
import math
import os
from typing import Any
import unicodedata

from absl import logging
import matplotlib
from matplotlib import figure
from matplotlib import font_manager
from matplotlib import ft2font
import numpy as np
from PIL import Image

from dmdd_jax import storage
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import records as records_lib
from dmdd_jax.scoring import calibration as calibration_lib

_COLORMAP = 'turbo'
_PREDICTION, _TRUTH = '#ff2d2d', '#39ff14'
_FONT, _FONT_SIZE, _DPI = 'DejaVu Sans', 9, 110
# Pixels of an image that a panel shows along each axis.
_SHOWN = 512
# Values looked at for the ends of the colours.
_RANGE_SAMPLE = 2**22
# Inches: a panel's width side by side and one above the other, its greatest
# height, the room for a panel's title, for a colour bar, and for a margin.
_NARROW, _WIDE, _TALLEST = 2.7, 8.2, 5.0
_LINE, _BAR, _MARGIN = 0.28, 0.75, 0.1
# Width / height from which panels stand one above the other, and beyond which
# (or its inverse) an image is stretched to it: it would be a line.
_STACKED, _LONGEST = 3.0, 8.0
_TITLE_COLUMNS = 110  # Letters that fit in a line above a picture.


def color_range(
  maps: Sequence[np.ndarray], pixel_threshold: float
) -> tuple[float, float]:
  """Lower and upper end of the colours, the same for every picture of a run.

  From the median to the 99.9th percentile of all maps, stretched so that the
  threshold lies inside. Of large maps a sample is taken.
  """
  if not len(maps):
    return 0.0, 1.0
  pixels = len(maps) * maps[0].size
  stride = max(1, math.ceil(math.sqrt(pixels / _RANGE_SAMPLE)))
  sample = np.concatenate([np.ravel(m[::stride, ::stride]) for m in maps])
  low, high = np.quantile(sample, (0.5, 0.999))
  if math.isfinite(pixel_threshold):
    high = max(high, pixel_threshold + 0.25 * (pixel_threshold - low))
  return float(low), float(max(high, low + 1e-6))


def calibrated_range(
  calibration: calibration_lib.Calibration,
) -> tuple[float, float]:
  """Ends of the colours for programs that do not have all maps.

  From the median of normal pixels, which calibration puts at 0, to two and a
  half times their threshold.
  """
  threshold = calibration.pixel_threshold
  return 0.0, 2.5 * threshold if threshold > 0.0 else 1.0


def shrink_image(image: np.ndarray) -> np.ndarray:
  """What `overlay` shows of an image (H, W, 3) uint8, each axis at most 512."""
  size = [min(length, _SHOWN) for length in image.shape[:2]]
  if size == list(image.shape[:2]):
    return image
  picture = Image.fromarray(image)
  return np.asarray(
    picture.resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0)
  )


def shrink_map(values: np.ndarray, side: int = _SHOWN) -> np.ndarray:
  """(H, W) with each axis at most `side`, by the highest value of each cell.

  A mean would hide defects of a few pixels.
  """
  for axis, length in enumerate(values.shape):
    if length > side:
      starts = np.arange(side) * length // side
      values = np.maximum.reduceat(values, starts, axis)
  return values


def overlay(
  image: np.ndarray,
  anomaly_map: np.ndarray,
  mask: np.ndarray | None,
  *,
  pixel_threshold: float,
  limits: tuple[float, float],
  name: str,
  text: str,
  size: tuple[int, int] | None = None,
) -> figure.Figure:
  """One image beside its map, with prediction and ground truth outlined.

  Args:
    image: (H, W, 3) uint8.
    anomaly_map: (h, w) float, of the whole image at any size.
    mask: (h, w), non-zero on defects, or None where the truth is not known.
    pixel_threshold: the map's level to outline; NaN outlines nothing.
    limits: of the colours, from `color_range`.
    name: of the image's file, any text. It stands above the picture, if a font
      of this machine has its letters.
    text: what stands after the name, in Latin letters.
    size: height and width of the image itself, where `image` is shrunk.
  """
  height, width = size or image.shape[:2]
  image = shrink_image(image)
  shape = image.shape[:2]
  shown_map = map_files.resize_map(shrink_map(anomaly_map), shape)
  picture, axes, colorbar = _panels(height, width)
  extent = dict(extent=(0, width, height, 0), aspect='auto')
  shades = dict(cmap=_COLORMAP, vmin=limits[0], vmax=limits[1])
  axes[0].imshow(image, **extent)
  axes[0].set_title(_image_title(height, width), fontsize=_FONT_SIZE)
  colors = axes[1].imshow(shown_map, **extent, **shades)
  axes[1].set_title('anomaly map', fontsize=_FONT_SIZE)
  picture.colorbar(colors, cax=colorbar)
  axes[2].imshow(image, **extent)
  outlines = [(shown_map, pixel_threshold, _PREDICTION)]
  legend = 'red: prediction'
  if mask is not None:
    truth = shrink_map((mask > 0).astype(np.float32))
    outlines.append((map_files.resize_map(truth, shape), 0.5, _TRUTH))
    legend += ', green: ground truth'
  axes[2].set_title(legend, fontsize=_FONT_SIZE)
  x, y = (
    (np.arange(count) + 0.5) * (length / count)
    for count, length in ((shape[1], width), (shape[0], height))
  )
  for values, level, color in outlines:
    if min(shape) > 1 and np.min(values) < level < np.max(values):
      axes[2].contour(
        x, y, values, levels=[level], colors=color, linewidths=1.2
      )
  for axis in axes:
    axis.set_axis_off()
  _add_title(picture, name, text)
  return picture


def save(picture: figure.Figure, path: str, title: str) -> None:
  """Writes a picture of `overlay` as PNG, with a title as its metadata."""
  with storage.writing(path) as file:
    picture.savefig(
      file,
      format='png',
      dpi=_DPI,
      metadata={'Title': files.printable(title)},
    )


def _panels(height: int, width: int):
  """A figure with three panels for an image of this size, and a colour bar."""
  aspect = min(max(width / height, 1 / _LONGEST), _LONGEST)
  stacked = aspect > _STACKED
  panel_width = _WIDE if stacked else _NARROW
  panel_height = min(panel_width / aspect, _TALLEST)
  panel_width = panel_height * aspect
  # A narrow panel still needs room for its title.
  cell = max(panel_width, _NARROW)
  rows, columns = (3, 1) if stacked else (1, 3)
  total_width = columns * (cell + _MARGIN) + _BAR + _MARGIN
  total_height = rows * (panel_height + _LINE) + _LINE + _MARGIN
  picture = figure.Figure(figsize=(total_width, total_height))

  def axes(left: float, top: float, wide: float, high: float):
    return picture.add_axes(
      (
        left / total_width,
        1 - (top + high) / total_height,
        wide / total_width,
        high / total_height,
      )
    )

  panels = []
  for index in range(3):
    row, column = (index, 0) if stacked else (0, index)
    left = _MARGIN + column * (cell + _MARGIN) + (_BAR if column == 2 else 0)
    top = _LINE + row * (panel_height + _LINE) + _LINE
    left += (cell - panel_width) / 2
    panels.append(axes(left, top, panel_width, panel_height))
    if index == 1:
      beside_map = (left + panel_width + 0.08, top, 0.12, panel_height)
  colorbar = axes(*beside_map)
  colorbar.tick_params(labelsize=_FONT_SIZE - 1)
  return picture, panels, colorbar


def _image_title(height: int, width: int) -> str:
  """'image', and its size where it is shown stretched."""
  if 1 / _LONGEST <= width / height <= _LONGEST:
    return 'image'
  return f'image, stretched: {width} x {height}'


def _add_title(picture: figure.Figure, name: str, text: str) -> None:
  """Writes name and text above, or the text where no font has the name."""
  name = _abbreviate(files.printable(name), _TITLE_COLUMNS - len(text))
  title, families = f'{name}: {text}', [_FONT]
  for letter in name:
    family = _family(letter)
    if family is None:
      logging.log_first_n(
        logging.WARNING,
        'no font of this machine has the letter %r of %s: pictures leave such'
        ' names out, and are named like their images. A font helps, for example'
        ' the package fonts-noto-cjk.',
        *(1, letter, name),
      )
      title, families = text, [_FONT]
      break
    if family not in families:
      families.append(family)
  picture.suptitle(
    title,
    y=1 - 0.05 / picture.get_figheight(),
    fontsize=_FONT_SIZE,
    fontfamily=families,
    parse_math=False,
  )


@functools.lru_cache(maxsize=4096)
def _family(letter: str) -> str | None:
  """The family of a font that can draw a letter, or None."""
  fonts = sorted(
    # Its letters are boxes that name a script.
    (
      f for f in font_manager.fontManager.ttflist if 'Last Resort' not in f.name
    ),
    key=lambda font: (font.name != _FONT, font.style != 'normal', font.fname),
  )
  for font in fonts:
    if _open_font(font.fname).get_char_index(ord(letter)):
      return font.name
  return None


@functools.lru_cache(maxsize=256)
def _open_font(path: str) -> ft2font.FT2Font:
  return ft2font.FT2Font(path)


def _abbreviate(name: str, columns: int) -> str:
  """A name of at most this many columns; a longer one loses its middle."""
  while True:
    # East Asian letters are twice as wide.
    wide = sum(unicodedata.east_asian_width(letter) in 'FW' for letter in name)
    excess = len(name) + wide - columns
    if excess <= 0:
      return name
    middle = len(name) // 2
    cut = max(1, excess // 4)
    name = f'{name[: middle - cut]}\u2026{name[middle + cut :]}'


def pair_strips(
  images: np.ndarray,
  masks: np.ndarray,
  maps: np.ndarray,
  calibration: calibration_lib.Calibration,
  count: int = 6,
) -> np.ndarray:
  """Image, mask and map side by side, for TensorBoard.

  Args:
    images: (N, S, S, 3) uint8.
    masks: (N, S, S) in {0, 1}.
    maps: (N, S, S) float.
    calibration: gives the colour scale.
    count: of pairs to show, the first ones.

  Returns:
    uint8 (min(N, count), S, 3 S, 3).
  """
  low, high = calibrated_range(calibration)
  shades = np.clip((maps[:count] - low) / (high - low), 0.0, 1.0)
  colors = matplotlib.colormaps[_COLORMAP](shades)[..., :3]
  truth = np.repeat(masks[:count, ..., None] * np.uint8(255), 3, axis=-1)
  parts = [images[:count], truth, np.round(colors * 255).astype(np.uint8)]
  return np.concatenate(parts, axis=2)


def choose(
  scores: np.ndarray, labels: np.ndarray, per_group: int
) -> list[tuple[str, int]]:
  """Best and worst images of each label: (name of the group, index)."""
  chosen = []
  for label, low, high in (
    (1, 'defect_missed', 'defect_found'),
    (0, 'good_clear', 'good_alarming'),
  ):
    order = [int(i) for i in np.argsort(scores, kind='stable')]
    order = [i for i in order if labels[i] == label]
    count = min(per_group, math.ceil(len(order) / 2))
    chosen += [(low, i) for i in order[:count]]
    rest = order[count:]
    chosen += [(high, i) for i in rest[::-1][:count]]
  return chosen


def write_overlays(
  directory: str | os.PathLike,
  records: Sequence[records_lib.Record],
  maps: Sequence[np.ndarray],
  scores: np.ndarray,
  calibration: calibration_lib.Calibration,
  per_group: int,
  white_level: int = 0,
) -> dict[str, str]:
  """Writes overlays of the lowest- and highest-scored images of each label.

  Args:
    directory: is made; older overlays in it are removed.
    records: N records.
    maps: N maps, (H_i, W_i).
    scores: (N,).
    calibration: its pixel threshold is outlined.
    per_group: images per group: defects with the lowest scores
      (`defect_missed`), with the highest (`defect_found`), and likewise good
      ones (`good_clear`, `good_alarming`).
    white_level: see `images.read_image`.

  Returns:
    {path: reason} of the pictures that could not be written.
  """
  failures: dict[str, str] = {}
  if per_group < 1 or not records:
    return failures
  storage.attempt(failures, os.fspath(directory), _make_empty, directory)
  matplotlib.rcParams['font.family'] = _FONT
  labels = np.array([record.label for record in records])
  limits = color_range(maps, calibration.pixel_threshold)
  for rank, (group, index) in enumerate(choose(scores, labels, per_group)):
    record = records[index]
    stem = os.path.splitext(os.path.basename(record.image))[0]
    name = f'{group}_{rank:02d}_{record.defect}_{stem}'
    path = storage.fit_name(os.path.join(directory, name), '.png')
    storage.attempt(
      failures,
      path,
      _write_record,
      path,
      record,
      maps[index],
      pixel_threshold=calibration.pixel_threshold,
      limits=limits,
      name=f'{record.defect}/{stem}',
      text=f'score {scores[index]:.2f}, threshold'
      f' {calibration.image_threshold:.2f}',
      white_level=white_level,
    )
  return failures


def _make_empty(directory: str | os.PathLike) -> None:
  """Makes the folder, and removes older pictures in it."""
  folder = storage.path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  for older in folder.iterdir():
    if older.suffix == '.png':
      older.unlink()


def _write_record(
  path: str,
  record: records_lib.Record,
  anomaly_map: np.ndarray,
  *,
  name: str,
  text: str,
  white_level: int,
  **options: Any,
) -> None:
  """Writes the overlay of a test image with its ground truth."""
  image = images_lib.read_image(record.image, None, white_level)
  mask = images_lib.native_mask(record) if record.has_truth else None
  picture = overlay(image, anomaly_map, mask, name=name, text=text, **options)
  save(picture, path, f'{name}: {text}')
