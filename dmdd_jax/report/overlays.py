"""Pictures: test images with map, outline and ground truth, one scale a run.

Synopsis:

  overlays.write_overlays('runs/demo/pictures', records, maps, scores,
                          calibration, per_group=4)
"""

from collections.abc import Sequence
import math
import os

import matplotlib
from matplotlib import figure
import numpy as np

from dmdd_jax import storage
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import records as records_lib
from dmdd_jax.scoring import calibration as calibration_lib

_COLORMAP = 'turbo'
_PREDICTION, _TRUTH = '#ff2d2d', '#39ff14'


def color_range(
  maps: Sequence[np.ndarray], pixel_threshold: float
) -> tuple[float, float]:
  """Lower and upper end of the colours, the same for every picture of a run.

  From the median to the 99.9th percentile of all maps, stretched so that the
  threshold lies inside.
  """
  sample = np.concatenate([np.ravel(m)[::7] for m in maps])
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


def overlay(
  image: np.ndarray,
  anomaly_map: np.ndarray,
  mask: np.ndarray | None,
  *,
  pixel_threshold: float,
  limits: tuple[float, float],
  title: str,
) -> figure.Figure:
  """One image beside its map, with prediction and ground truth outlined.

  Args:
    image: (H, W, 3) uint8.
    anomaly_map: (H, W) float.
    mask: (H, W), non-zero on defects, or None where the truth is not known.
    pixel_threshold: the map's level to outline; NaN outlines nothing.
    limits: of the colours, from `color_range`.
    title: a line above.
  """
  picture = figure.Figure(figsize=(9.2, 3.4), layout='constrained')
  axes = picture.subplots(1, 3)
  shades = dict(cmap=_COLORMAP, vmin=limits[0], vmax=limits[1])
  axes[0].imshow(image)
  axes[0].set_title('image', fontsize=9)
  colors = axes[1].imshow(anomaly_map, **shades)
  axes[1].set_title('anomaly map', fontsize=9)
  picture.colorbar(colors, ax=axes[1], shrink=0.8)
  axes[2].imshow(image)
  outlines = [(anomaly_map, pixel_threshold, _PREDICTION)]
  legend = 'red: prediction'
  if mask is not None:
    outlines.append((mask > 0, 0.5, _TRUTH))
    legend += ', green: ground truth'
  axes[2].set_title(legend, fontsize=9)
  for values, level, color in outlines:
    if np.min(values) < level < np.max(values):
      axes[2].contour(values, levels=[level], colors=color, linewidths=1.2)
  for axis in axes:
    axis.set_axis_off()
  picture.suptitle(title, fontsize=9)
  return picture


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
) -> list[str]:
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

  Returns:
    The files' paths.
  """
  if per_group < 1 or not records:
    return []
  folder = storage.path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  for older in folder.iterdir():
    if older.suffix == '.png':
      older.unlink()
  matplotlib.rcParams['font.family'] = 'DejaVu Sans'
  labels = np.array([record.label for record in records])
  limits = color_range(maps, calibration.pixel_threshold)
  paths = []
  for rank, (group, index) in enumerate(choose(scores, labels, per_group)):
    record, anomaly_map = records[index], maps[index]
    stem = os.path.splitext(os.path.basename(record.image))[0]
    height, width = anomaly_map.shape
    image = images_lib.read_image(record.image, None)
    image = _fit(image, (height, width))
    mask = None
    if record.has_truth:
      mask = _fit(images_lib.native_mask(record), (height, width))
    picture = overlay(
      image,
      anomaly_map,
      mask,
      pixel_threshold=calibration.pixel_threshold,
      limits=limits,
      title=f'{record.defect}/{stem}: score {scores[index]:.2f}, threshold'
      f' {calibration.image_threshold:.2f}',
    )
    path = os.path.join(
      directory, f'{group}_{rank:02d}_{record.defect}_{stem}.png'
    )
    with storage.writing(path) as file:
      picture.savefig(file, dpi=110)
    paths.append(path)
  return paths


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Nearest-neighbour resize of (H, W, ...) for display."""
  rows = np.arange(size[0]) * image.shape[0] // size[0]
  columns = np.arange(size[1]) * image.shape[1] // size[1]
  return image[rows][:, columns]
