"""From a checkpoint to scores, verdicts, maps and overlays of new images.

Synopsis:

  inspector = predict.load('runs/mvtec/screw')
  result = inspector(['new/part_17.png'])[0]
  print(result.score, result.verdict, result.map.shape)

  summary = predict.predict('runs/mvtec/screw', 'new/*.png', 'out')
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import csv
import dataclasses
import io
import os
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np
import tqdm

from dmdd_jax import sharding
from dmdd_jax import storage
from dmdd_jax import verdict as verdict_lib
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import tiles
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.report import overlays
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import trained as trained_lib
from dmdd_jax.training import train_state

MAP_FORMATS = ('tiff', 'npy', 'none')


@dataclasses.dataclass(frozen=True)
class Result:
  """What is said of one image.

  Attributes:
    score: image score, higher is more anomalous.
    verdict: 'defective' (score >= threshold), 'good', or 'uncalibrated' where
      no image was held out in training.
    scaled: how far the score is above the threshold, see `Calibration.scaled`.
    map: (H, W) float32 at the image's own size.
  """

  score: float
  verdict: str
  scaled: float
  map: np.ndarray


class Inspector:
  """A trained model that can be called from any thread.

  An image of any size is resized to `data.image_size` and, where the model sees
  tiles, predicted tile by tile.

  Attributes:
    config: of the training.
    calibration: thresholds and scales from held-out normal images.
    step: of the checkpoint.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    state: train_state.TrainState,
    calibration: calibration_lib.Calibration,
  ):
    self.config, self.calibration = config, calibration
    self.step = int(state.step)
    # Scores must not depend on the machine's device count: one device.
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    self._state = sharding.replicate(mesh, state)
    # One image alone is not to wait for the rows of a batch.
    alone = min(len(tiles.make_grid(config.data)), config.eval.batch_size)
    self._predictors = [
      predictor_lib.Predictor(config, mesh, rows)
      for rows in sorted({alone, config.eval.batch_size})
    ]
    side = tiles.input_side(config.data)
    for predictor in self._predictors:
      blank = np.zeros((1, side, side, 3), np.uint8)
      predictor(self._state, calibration.fusion, blank)

  @property
  def batch_size(self) -> int:
    """How many images run at once."""
    return self._predictors[-1].batch_size

  def __call__(
    self, images: Sequence[str | os.PathLike | np.ndarray]
  ) -> list[Result]:
    """Inspects images: files, or uint8 arrays (H, W, 3) or (H, W), any sizes.

    Raises:
      BadImageError: a file or an array that is no image, named.
    """
    prepared = [self._prepare(image) for image in images]
    results = []
    for start in range(0, len(prepared), self.batch_size):
      results += self._run(prepared[start : start + self.batch_size])
    return results

  def _prepare(
    self, image: str | os.PathLike | np.ndarray
  ) -> tuple[np.ndarray, tuple[int, int]]:
    """The image at the model's size, and its own (height, width)."""
    side = self.config.data.image_size
    if not isinstance(image, np.ndarray):
      image = images_lib.read_image(image, None)
    elif image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
      raise files.BadImageError(
        f'an image array must be uint8 (H, W, 3) or (H, W), is {image.dtype}'
        f' {image.shape}'
      )
    size = image.shape[:2]
    return images_lib.resize_image(image, side), size

  def _run(
    self, prepared: Sequence[tuple[np.ndarray, tuple[int, int]]]
  ) -> list[Result]:
    predictor = self._predictors[0 if len(prepared) == 1 else -1]
    images = np.stack([image for image, _ in prepared])
    prediction = predictor(self._state, self.calibration.fusion, images)
    return [
      Result(
        score=float(score),
        verdict=self.verdict(float(score)),
        scaled=self.calibration.scaled(float(score)),
        map=map_files.resize_map(anomaly_map, size),
      )
      for score, anomaly_map, (_, size) in zip(
        prediction.image_score, prediction.map, prepared
      )
    ]

  def verdict(self, score: float) -> str:
    """What a score means at the calibrated threshold."""
    return self.calibration.verdict(score)


def load(workdir: str | os.PathLike, step: int | None = None) -> Inspector:
  """Loads the checkpoint of a category's folder, by default the newest.

  Raises:
    CheckpointError: there is none, or it cannot be read.
  """
  config, state, calibration, _ = trained_lib.load_workdir(workdir, step)
  return Inspector(config, state, calibration)


def predict(
  workdir: str | os.PathLike,
  pattern: str,
  output: str | os.PathLike,
  map_format: str = 'tiff',
  overlays: bool = True,
) -> dict[str, Any]:
  """Inspects files and writes predictions.csv, .json, maps and overlays.

  Args:
    workdir: a trained category's folder.
    pattern: see `files.list_inputs`.
    output: a folder, made if missing; gets maps/ and overlays/ with the
      images' paths below their common folder.
    map_format: one of `MAP_FORMATS`.
    overlays: write a picture per image, one colour scale for all.

  Returns:
    {'images', 'defective', 'failed': {file: reason}, 'table': path of the CSV}
  """
  if map_format not in MAP_FORMATS:
    raise ValueError(
      f'--maps={map_format!r}: choose one of {", ".join(MAP_FORMATS)}'
    )
  output = os.fspath(output)
  listing = files.list_inputs(pattern, output)
  paths = listing.images
  inspector = load(workdir)
  base = os.path.commonpath(
    [os.path.dirname(os.path.abspath(p)) for p in paths]
  )
  rows, failed = [], dict(listing.faults)
  with concurrent.futures.ThreadPoolExecutor() as writers:
    writing = []
    for path, image, result in _inspect_files(inspector, paths):
      if isinstance(result, Exception):
        failed[path] = str(result)
        logging.error('skipped: %s', result)
        continue
      name = os.path.relpath(os.path.abspath(path), base)
      rows.append(_row(inspector, path, result))
      if map_format != 'none':
        target = os.path.join(output, 'maps', f'{name}.{map_format}')
        writing.append(writers.submit(map_files.write_map, target, result.map))
      if overlays:
        target = os.path.join(output, 'overlays', f'{name}.png')
        job = (_write_overlay, inspector, target, name, image, result)
        writing.append(writers.submit(*job))
    for pending in writing:
      pending.result()
  table = _write_predictions(output, inspector, rows, failed, listing.others)
  defective = sum(row['verdict'] == verdict_lib.DEFECTIVE for row in rows)
  logging.info(
    '%d images, %d defective, %d could not be read; %s',
    len(rows),
    defective,
    len(failed),
    table,
  )
  return {
    'images': len(rows),
    'defective': defective,
    'failed': failed,
    'table': table,
  }


def _inspect_files(
  inspector: Inspector, paths: Sequence[str]
) -> Iterator[tuple[str, np.ndarray | None, Result | Exception]]:
  """Yields every file in order; decoding runs a batch ahead of the model."""

  def read(path: str) -> np.ndarray | Exception:
    try:
      return images_lib.read_image(path, None)
    except (files.BadImageError, OSError) as error:
      return error

  size = inspector.batch_size
  starts = range(0, len(paths), size)
  with (
    concurrent.futures.ThreadPoolExecutor() as readers,
    tqdm.tqdm(total=len(paths), unit='image') as progress,
  ):
    ahead = [readers.submit(read, path) for path in paths[:size]]
    for start in starts:
      names = paths[start : start + size]
      loaded = [pending.result() for pending in ahead]
      following = paths[start + size : start + 2 * size]
      ahead = [readers.submit(read, path) for path in following]
      images = [x for x in loaded if not isinstance(x, Exception)]
      results = iter(inspector(images))
      for name, item in zip(names, loaded):
        progress.update()
        if isinstance(item, Exception):
          yield name, None, item
        else:
          yield name, item, next(results)


def _row(inspector: Inspector, path: str, result: Result) -> dict[str, Any]:
  threshold = inspector.calibration.image_threshold
  return {
    'file': path,
    'score': result.score,
    'threshold': threshold,
    'scaled': result.scaled,
    'verdict': result.verdict,
    'height': result.map.shape[0],
    'width': result.map.shape[1],
  }


def _write_overlay(
  inspector: Inspector,
  target: str,
  name: str,
  image: np.ndarray,
  result: Result,
) -> None:
  calibration = inspector.calibration
  picture = overlays.overlay(
    image,
    result.map,
    None,
    pixel_threshold=calibration.pixel_threshold,
    limits=overlays.calibrated_range(calibration),
    title=f'{name}: score {result.score:.2f}, {result.verdict}',
  )
  os.makedirs(os.path.dirname(target), exist_ok=True)
  picture.savefig(target, dpi=110)


def _write_predictions(
  output: str,
  inspector: Inspector,
  rows: Sequence[dict[str, Any]],
  failed: dict[str, str],
  ignored: Sequence[str],
) -> str:
  """Writes predictions.csv and predictions.json; returns the CSV's path."""
  text = io.StringIO()
  fields = ('file', 'score', 'threshold', 'scaled', 'verdict')
  fields += ('height', 'width')
  table = csv.DictWriter(text, fields, lineterminator='\n')
  table.writeheader()
  table.writerows(rows)
  path = os.path.join(output, 'predictions.csv')
  storage.write_text(path, text.getvalue())
  document = {
    'category': inspector.config.data.category,
    'step': inspector.step,
    'calibration': inspector.calibration.to_dict(),
    'predictions': list(rows),
    'failed': failed,
    'ignored': list(ignored),
  }
  storage.write_text(
    os.path.join(output, 'predictions.json'), results_lib.format_json(document)
  )
  return path
