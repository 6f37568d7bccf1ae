"""Evaluation: from a state, or from a workdir's checkpoint alone.

Synopsis:

  results = evaluate.evaluate(predictor, state, calibration, dataset.test)
  summary = evaluate.evaluate_workdir('runs/mvtec/screw')
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import os
import time
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np
from scipy import ndimage

from dmdd_jax import calibration as calibration_lib
from dmdd_jax import checkpoint
from dmdd_jax import provenance
from dmdd_jax import report as report_lib
from dmdd_jax import report_data
from dmdd_jax import sharding
from dmdd_jax import steps
from dmdd_jax import storage
from dmdd_jax import train_state
from dmdd_jax import visualize
from dmdd_jax.data import batches
from dmdd_jax.data import layouts
from dmdd_jax.data import loco
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import tiles
from dmdd_jax.metrics import maps as maps_lib
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.models import dmdd

RESOLUTIONS = ('model', 'native')
# Bytes of encoded thumbnails kept in memory; the rest goes to a file.
_THUMBNAIL_BYTES = 2**26
# False-positive rates up to which MVTec LOCO's sPRO is taken.
_SPRO_LIMITS = {'spro': 0.3, 'spro_005': 0.05}
# Training images whose distances are averaged, at most; the smoothing of that
# mean, in pixels: half the stride of the deepest features; and the share of
# positions that are usual: what the mean is above them in others is bias.
_POSITION_IMAGES = 128
_POSITION_SIGMA = 8.0
_POSITION_QUANTILE = 0.8
_PIXEL_AT_THRESHOLD = ('pixel_precision', 'pixel_recall', 'pixel_f1')


class Predictor:
  """A model, its variables and its fusion behind one jitted function.

  Attributes:
    config: of the model.
    mesh: of devices.
    batch_size: images at once; it is lower where each has several tiles.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
  ):
    """Makes the function.

    Args:
      config: of the model.
      mesh: all devices by default.
      batch_size: images, or tiles of images, that the function takes at once;
        by default `config.eval.batch_size`.
    """
    self.config = config
    self.mesh = sharding.make_mesh() if mesh is None else mesh
    # Padded rows make any batch divide over the devices.
    rows = batch_size or config.eval.batch_size
    self._rows = math.ceil(rows / self.mesh.size) * self.mesh.size
    self._tiled = len(tiles.make_grid(config.data)) > 1
    size = config.data.image_size
    self.batch_size = self.images_at_once((size, size))
    if self._tiled:
      # Smoothing comes after the tiles are put together.
      config = config.copy_and_resolve_references()
      with config.unlocked():
        config.eval.smoothing_sigma = 0.0
    self._step = steps.make_predict_step(
      config, dmdd.from_config(config), self.mesh
    )

  def __call__(
    self,
    state: train_state.TrainState,
    fusion: steps.Fusion,
    images: np.ndarray,
  ) -> steps.Prediction:
    """Predicts (N, S, S, 3) uint8 images, N <= `images_at_once`; numpy arrays.

    With tiles, S may be any side from that of a tile on. All processes of the
    mesh give the same images, and get all predictions.
    """
    if self._tiled:
      return self._predict_tiled(state, fusion, images)
    return self._predict_whole(state, fusion, images)

  def images_at_once(self, shape: tuple[int, int]) -> int:
    """How many images (H, W) fill the function's rows; at least one."""
    return max(1, self._rows // len(tiles.make_grid(self.config.data, shape)))

  def _predict_tiled(
    self,
    state: train_state.TrainState,
    fusion: steps.Fusion,
    images: np.ndarray,
  ) -> steps.Prediction:
    """Predicts images (N, H, W, 3) tile by tile, never one as a whole."""
    options = self.config.eval
    grid = tiles.make_grid(self.config.data, images.shape[1:3])
    probability, distance, maps_mean = np.zeros(
      (3, *images.shape[:3]), np.float32
    )
    places = [
      (n, tile) for n in range(len(images)) for tile in range(len(grid))
    ]
    for start in range(0, len(places), self._rows):
      some = places[start : start + self._rows]
      parts = np.stack([grid.cut(images[n], tile) for n, tile in some])
      found = self._predict_whole(state, fusion, parts)
      for row, (n, tile) in enumerate(some):
        grid.add(probability[n], tile, found.probability[row])
        grid.add(distance[n], tile, found.distance[row])
        grid.add(maps_mean[n], tile, found.maps_mean[row])
    if options.smoothing_sigma:
      for anomaly_map in (*probability, *distance, *maps_mean):
        ndimage.gaussian_filter(  # As `steps.smooth` does it.
          anomaly_map, options.smoothing_sigma, output=anomaly_map
        )

    def scores(maps: np.ndarray) -> np.ndarray:
      tops = [map_files.top_mean(m, options.score_top_pixels) for m in maps]
      return np.array(tops, np.float32)

    # First, lest two whole fused maps be held at once.
    score = scores(fusion.scored(probability, distance))
    return steps.Prediction(
      map=np.asarray(fusion(probability, distance), np.float32),
      score=score,
      maps_mean=maps_mean,
      maps_mean_score=scores(maps_mean),
      distance=distance,
      probability=probability,
    )

  def _predict_whole(
    self,
    state: train_state.TrainState,
    fusion: steps.Fusion,
    images: np.ndarray,
  ) -> steps.Prediction:
    """Predicts (N, S, S, 3) of the model's input side, N <= rows."""
    count = len(images)
    rows = batches.pad_rows(images, self._rows)
    found = self._run(state, fusion, sharding.local_rows(self.mesh, rows))
    return jax.tree.map(lambda x: x[:count], found)

  def _run(
    self,
    state: train_state.TrainState,
    fusion: steps.Fusion,
    rows: np.ndarray,
  ) -> steps.Prediction:
    """Predicts this process's rows of a batch; all rows, as numpy arrays."""
    batch = sharding.to_global(self.mesh, {'image': rows})
    variables = train_state.variables(state)
    found = self._step(variables, fusion, batch['image'])
    return sharding.to_host(self.mesh, found)

  def over_records(
    self,
    state: train_state.TrainState,
    fusion: steps.Fusion,
    records: Sequence[records_lib.Record],
  ) -> Iterator[tuple[dict[str, np.ndarray], steps.Prediction]]:
    """Yields (batch, prediction) without padding, every record once.

    Each process of the mesh decodes its share of a batch and yields all of it;
    with tiles, of which it predicts its share, it decodes all.
    """
    size, shard = self.config.data.image_size, sharding.shard(self.mesh)
    if self._tiled:
      for batch in batches.eval_batches(records, size, self.batch_size):
        count = int(batch['_mask'].sum())
        batch = {key: value[:count] for key, value in batch.items()}
        yield batch, self(state, fusion, batch['image'])
      return
    for rows in batches.eval_batches(records, size, self.batch_size, shard):
      found = self._run(state, fusion, rows['image'])
      batch = sharding.whole_rows(self.mesh, rows)
      # Only the last rows of the last batch are padding.
      count = int(batch['_mask'].sum())
      yield jax.tree.map(lambda x, count=count: x[:count], (batch, found))


def predict_images(
  predictor: Predictor,
  state: train_state.TrainState,
  fusion: steps.Fusion,
  images: np.ndarray,
) -> steps.Prediction:
  """Predicts any number of uint8 images (N, S, S, 3), N >= 1."""
  rows = predictor.images_at_once(images.shape[1:3])
  found = [
    predictor(state, fusion, images[i : i + rows])
    for i in range(0, len(images), rows)
  ]
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def learn_positions(
  predictor: Predictor,
  state: train_state.TrainState,
  images: np.ndarray,
) -> train_state.TrainState:
  """The state with `dmdd.PositionBias` learned from training images.

  Args:
    predictor: of the state; its `eval.smoothing_sigma` is in the distances too.
    state: of a model with or without `head.position_bias`; of one without, it
      is returned as it is.
    images: uint8 (N, S, S, 3), images or tiles of the model's input side,
      N >= 1; with more than 128, so many of them by `config.seed`.
  """
  if 'position' not in state.batch_stats:
    return state

  def with_bias(bias: np.ndarray) -> train_state.TrainState:
    bias = sharding.replicate(predictor.mesh, bias.astype(np.float32))
    stats = {**state.batch_stats, 'position': {'bias': bias}}
    return state.replace(batch_stats=stats)

  shape = state.batch_stats['position']['bias'].shape
  unknown = with_bias(np.zeros(shape))
  rng = np.random.default_rng(predictor.config.seed % 2**64)
  order = rng.permutation(len(images))
  chosen = np.sort(order[:_POSITION_IMAGES])
  found = predict_images(predictor, unknown, steps.Fusion(), images[chosen])
  mean = np.mean(found.distance, axis=0, dtype=np.float64)
  # Smooth, or the texture of these very images would stay in it.
  mean = ndimage.gaussian_filter(mean, _POSITION_SIGMA)
  stride = mean.shape[0] // shape[0]
  mean = mean.reshape(shape[0], stride, shape[1], stride).mean(axis=(1, 3))
  usual = np.quantile(mean, _POSITION_QUANTILE)
  return with_bias(np.maximum(mean - usual, 0.0))


def calibrate(
  predictor: Predictor,
  state: train_state.TrainState,
  images: np.ndarray,
) -> calibration_lib.Calibration:
  """Fits fusion, thresholds and scales on held-out normals (N, S, S, 3)."""
  config = predictor.config
  trained = steps.head_is_trained(config, int(state.step))
  if not len(images):
    return calibration_lib.uncalibrated(config, trained)
  raw = predict_images(predictor, state, steps.Fusion(), images)
  fusion = calibration_lib.fit_fusion(
    config, raw.probability, raw.distance, trained
  )
  found = predict_images(predictor, state, fusion, images)
  return calibration_lib.fit(config, fusion, found.map, found.score)


def evaluate(
  predictor: Predictor,
  state: train_state.TrainState,
  calibration: calibration_lib.Calibration,
  records: Sequence[records_lib.Record],
  pictures: str | os.PathLike | None = None,
  maps: str | os.PathLike | None = None,
  report: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """All metrics of a test set.

  Args:
    predictor: of the config. All processes measure the same, process 0 writes.
    state: the trained state.
    calibration: stored with it.
    records: the test images; the folder of an image decides its label.
    pictures: a folder for overlays of some test images; None writes none.
    maps: a folder for the final maps as float32 TIFF, at the first of
      `eval.resolutions`, in the layout of data/maps.py; None writes none.
    report: a folder for `scores.csv` and the report's data, see
      `report_data.write`; None writes none.

  Returns:
    The keys of `metrics.results.compute` for the final map (those of pixels
    are NaN, with the reason, if a defective image has no mask); the same for
    the mean of the distance maps under `maps_mean`; precision, recall and F1 at
    the calibrated thresholds under `at_threshold`. With both resolutions
    asked for, the figures at the masks' own sizes stand under `native`.
  """
  config = predictor.config
  check_options(config.eval)
  if jax.process_index():
    pictures = maps = report = None
  with contextlib.ExitStack() as stack:
    stores = {
      (resolution, kind): stack.enter_context(results_lib.MapStore())
      for resolution in config.eval.resolutions
      for kind in ('map', 'maps_mean')
    }
    thumbnails = None
    if report is not None:
      thumbnails = maps_lib.ArraySpool(_THUMBNAIL_BYTES)
      stack.callback(thumbnails.close)
    scores = _collect(
      predictor, state, calibration.fusion, records, stores, thumbnails
    )
    metrics = _measure(config, calibration, records, scores, stores)
    store = stores[config.eval.resolutions[0], 'map']
    if config.data.name == loco.NAME:
      _add_spro(metrics, config.data, records, store.maps)
    if maps is not None:
      _write_maps(maps, config.data.category, records, store)
    if pictures is not None:
      shown = (records, store.maps, scores['map'], calibration)
      visualize.write_overlays(pictures, *shown, per_group=config.eval.pictures)
    if report is not None:
      shown = (records, scores, store, thumbnails, calibration)
      _write_report(report, config.data.root, *shown)
  return metrics


def _write_report(report: str | os.PathLike, root: str, *shown: Any) -> None:
  """`report_data.write`, whose failure is no end of an evaluation."""
  try:
    report_data.write(report, root, *shown)
  except Exception:  # Hours of training must not end for a picture.
    logging.exception("%s: the report's data were not written", report)


def _add_spro(
  metrics: dict[str, Any],
  data: ml_collections.ConfigDict,
  records: Sequence[records_lib.Record],
  maps: Sequence[np.ndarray],
) -> None:
  """Adds MVTec LOCO's sPRO: of both kinds of anomalies, and their mean.

  NaN, with the reason under `undefined`, without what it needs.
  """
  reason = 'no such anomalies in the test'
  found = dict.fromkeys(_SPRO_LIMITS, math.nan)
  try:
    if why := _unknown_truth(records):
      raise records_lib.MissingDataError(why)
    kinds = loco.read_config(data.root, data.category)
    parts = {
      defect.removesuffix('_anomalies'): _spro(defect, kinds, records, maps)
      for defect in loco.DEFECTS
    }
    for index, name in enumerate(_SPRO_LIMITS):
      values = {f'{name}_{kind}': part[index] for kind, part in parts.items()}
      found |= {name: float(np.mean(list(values.values()))), **values}
  except (records_lib.MissingDataError, records_lib.DatasetError) as error:
    logging.warning('sPRO is null: %s', error)
    reason = str(error)
  undefined = {k: reason for k, value in found.items() if math.isnan(value)}
  metrics.update(found)
  if undefined:
    metrics['undefined'] = metrics.get('undefined', {}) | undefined


def _spro(
  defect: str,
  kinds: Mapping[int, Mapping[str, Any]],
  records: Sequence[records_lib.Record],
  maps: Sequence[np.ndarray],
) -> list[float]:
  """sPRO of one kind of anomalies and the good images, at the masks' sizes.

  As MVTec LOCO's evaluation code has it; saturation areas count pixels there.
  """
  regions = []
  with results_lib.MapStore() as native:
    for record, anomaly_map in zip(records, maps, strict=True):
      if record.defect in (defect, records_lib.GOOD):
        mask = records_lib.native_mask(record)
        native.append(map_files.resize_map(anomaly_map, mask.shape), mask)
        regions.append(loco.read_regions(record, kinds))
    return region.spro(native.maps, regions, tuple(_SPRO_LIMITS.values()))


def _write_maps(
  folder: str | os.PathLike,
  category: str,
  records: Sequence[records_lib.Record],
  store: results_lib.MapStore,
) -> None:
  for record, anomaly_map in zip(records, store.maps):
    stem = map_files.map_path(folder, category, record)
    map_files.write_map(f'{stem}.tiff', anomaly_map)


def _measure(
  config: ml_collections.ConfigDict,
  calibration: calibration_lib.Calibration,
  records: Sequence[records_lib.Record],
  scores: Mapping[str, np.ndarray],
  stores: Mapping[tuple[str, str], results_lib.MapStore],
) -> dict[str, Any]:
  """The metrics of `evaluate` from the scores and maps of both kinds."""
  labels = np.array([record.label for record in records], int)
  unknown = _unknown_truth(records)
  found = {}
  for (resolution, kind), store in stores.items():
    metrics = results_lib.compute(
      store.maps,
      None if unknown else store.masks,
      scores[kind],
      labels,
      bootstrap=config.eval.bootstrap,
      seed=config.seed,
    )
    if unknown:
      _explain(metrics, 'no masks', unknown)
    found.setdefault(resolution, {})[kind] = metrics
  found = {
    resolution: {**kinds['map'], 'maps_mean': kinds['maps_mean']}
    for resolution, kinds in found.items()
  }
  first, *others = config.eval.resolutions
  metrics = {
    **found[first],
    'resolution': first,
    'smoothing_sigma': config.eval.smoothing_sigma,
  }
  metrics |= {other: found[other] for other in others}
  metrics['at_threshold'] = _at_threshold(
    calibration, stores[first, 'map'], scores['map'], labels, unknown
  )
  return metrics


def _unknown_truth(records: Sequence[records_lib.Record]) -> str | None:
  """Why there are no pixel metrics; None where every image has its truth."""
  missing = sum(not record.has_truth for record in records)
  if not missing:
    return None
  defective = sum(record.label for record in records)
  reason = f'{missing} of {defective} defective images have no mask'
  logging.warning('pixel metrics are null: %s', reason)
  return reason


def _explain(metrics: dict[str, Any], reason: str, better: str) -> None:
  """Puts a better reason for undefined metrics in the place of another."""
  reasons = metrics['undefined']
  metrics['undefined'] = {
    name: better if why == reason else why for name, why in reasons.items()
  }


def check_options(options: ml_collections.ConfigDict) -> None:
  """Raises ValueError where `config.eval` asks for the impossible."""
  resolutions = tuple(options.resolutions)
  if not resolutions or not set(resolutions) <= set(RESOLUTIONS):
    raise ValueError(
      f'config.eval.resolutions is {resolutions}; choose from {RESOLUTIONS}'
    )
  for field in ('batch_size', 'score_top_pixels'):
    if options[field] < 1:
      raise ValueError(f'config.eval.{field} must be >= 1, is {options[field]}')


def _collect(
  predictor: Predictor,
  state: train_state.TrainState,
  fusion: steps.Fusion,
  records: Sequence[records_lib.Record],
  stores: Mapping[tuple[str, str], results_lib.MapStore],
  thumbnails: maps_lib.ArraySpool | None,
) -> dict[str, np.ndarray]:
  """Fills the stores in the records' order; returns the scores by kind."""
  scores = {'map': [], 'maps_mean': []}
  remaining = iter(records)
  for batch, prediction in predictor.over_records(state, fusion, records):
    scores['map'].append(prediction.score)
    scores['maps_mean'].append(prediction.maps_mean_score)
    for row, mask in enumerate(batch['mask'][..., 0]):
      record = next(remaining)
      if thumbnails is not None:
        thumbnails.append(report_data.encode_image(batch['image'][row]))
      for (resolution, kind), store in stores.items():
        anomaly_map, truth = getattr(prediction, kind)[row], mask
        if resolution == 'native':
          truth = records_lib.native_mask(record)
          anomaly_map = map_files.resize_map(anomaly_map, truth.shape)
        store.append(anomaly_map, truth)
  none = np.zeros(0, np.float32)  # A test split may be empty.
  return {k: np.concatenate([none, *parts]) for k, parts in scores.items()}


def _at_threshold(
  calibration: calibration_lib.Calibration,
  store: results_lib.MapStore,
  scores: np.ndarray,
  labels: np.ndarray,
  unknown: str | None,
) -> dict[str, Any]:
  """Precision, recall and F1 at the calibrated thresholds.

  Where the truth of pixels is `unknown`, for that reason, theirs are NaN.
  """
  found = {
    'image_threshold': calibration.image_threshold,
    'pixel_threshold': calibration.pixel_threshold,
  }
  levels = {
    'image': (scores, labels, calibration.image_threshold),
    'pixel': (store.maps, store.masks, calibration.pixel_threshold),
  }
  for level, arguments in levels.items():
    for name, value in results_lib.precision_recall_f1(*arguments).items():
      found[f'{level}_{name}'] = value
  if unknown:
    names = [name for name in found if name in _PIXEL_AT_THRESHOLD]
    found.update(dict.fromkeys(names, math.nan))
    found['undefined'] = dict.fromkeys(names, unknown)
  good = scores[labels == 0]
  if len(good):
    rate = float(np.mean(good >= calibration.image_threshold))
    found['image_false_positive_rate'] = rate
  return found


def load_workdir(
  workdir: str | os.PathLike, step: int | None = None
) -> tuple[
  ml_collections.ConfigDict,
  train_state.TrainState,
  calibration_lib.Calibration,
  dict[str, Any],
]:
  """Reads a category's folder: config, state, calibration, and the metadata.

  Without a step, the newest checkpoint that can be read is taken; the log says
  which were left out and why.

  Raises:
    CheckpointError: there is no checkpoint, or it cannot be read.
  """
  directory = os.path.join(storage.absolute(workdir), 'checkpoints')
  if not storage.path(directory).is_dir():
    trained = [os.path.basename(folder) for folder in _trained(workdir)]
    if len(trained) == 1:
      return load_workdir(os.path.join(workdir, trained[0]), step)
    raise checkpoint.CheckpointError(
      f'{workdir} holds no checkpoints; name the folder of one trained'
      f' category ({", ".join(trained) or "none is there"}), or train first'
      ' (--mode train)'
    )
  manager = checkpoint.open_manager(directory)

  def read(step: int):
    config, state, meta = checkpoint.restore_alone(manager, step)
    return config, state, calibration_lib.from_dict(meta['calibration']), meta

  try:
    return checkpoint.read_newest(manager, read, step)
  finally:
    checkpoint.close(manager)


def _trained(workdir: str | os.PathLike) -> list[str]:
  """The folders of trained categories in the folder of a run."""
  return storage.folders(workdir, 'checkpoints')


def evaluate_workdir(
  workdir: str | os.PathLike,
  output: str | os.PathLike | None = None,
  *,
  data_root: str | None = None,
  eval_options: Mapping[str, Any] | None = None,
  step: int | None = None,
  maps: str | os.PathLike | None = None,
  recalibrate: bool = False,
) -> dict[str, Any]:
  """Evaluates a category's checkpoint and writes its results and pictures.

  Args:
    workdir: the category's folder.
    output: where to write `results.json`, `pictures/`, `scores.csv` and
      `report_data.zip`; the workdir.
    data_root: where the data lie now; None means where they lay in training.
    eval_options: fields of `config.eval` to change.
    step: which checkpoint, by default the newest.
    maps: see `evaluate`.
    recalibrate: fit fusion and thresholds again on the images that training
      held out, instead of taking those stored with the checkpoint.

  Returns:
    What stands in `results.json`.
  """
  started = time.time()
  config, state, calibration, meta = load_workdir(workdir, step)
  with config.unlocked():
    config.data.root = data_root or config.data.root
    config.eval.update(eval_options or {})
  dataset = layouts.list_dataset(config.data)
  records = records_lib.validate(dataset.test, config.data.on_bad_image)
  output = os.fspath(output or workdir)
  pictures = os.path.join(output, 'pictures')
  predictor = Predictor(config)
  if recalibrate:
    calibration = calibrate(predictor, state, held_out_images(config, dataset))
    meta = {**meta, 'calibration': calibration.to_dict()}
  else:
    for field in ('smoothing_sigma', 'score_top_pixels'):
      before, now = meta['config']['eval'][field], config.eval[field]
      if before != now:
        logging.warning(
          'the thresholds are of eval.%s = %g, the maps and scores now of %g:'
          ' recalibrate to bring them together',
          *(field, before, now),
        )
  metrics = evaluate(
    predictor, state, calibration, records, pictures, maps, report=output
  )
  metrics['validation'] = meta['validation']
  metrics |= provenance.describe(
    config, meta, step=int(state.step), seconds=time.time() - started
  )
  if jax.process_index() == 0:
    results_lib.write_json(os.path.join(output, 'results.json'), metrics)
  return metrics


def held_out_images(
  config: ml_collections.ConfigDict, dataset: records_lib.Dataset
) -> np.ndarray:
  """The (K, S, S, 3) uint8 training images held out by this config's seed."""
  data = config.data
  good = records_lib.validate(dataset.train, data.on_bad_image)
  _, held_out = records_lib.split_holdout(
    good, data.holdout_fraction, data.holdout_min, config.seed
  )
  return records_lib.load_arrays(held_out, data.image_size)[0]


def evaluate_run(
  workdir: str | os.PathLike,
  output: str | os.PathLike | None = None,
  **options: Any,
) -> str:
  """Evaluates a category's folder, or every one in the folder of a run.

  Args:
    workdir: a folder that holds `checkpoints/`, or folders that do.
    output: where to write; the workdir.
    **options: of `evaluate_workdir`.

  Returns:
    The table over the categories, as text; for the folder of a run, or another
    output, it is written there as results.json, .csv and .md. A report.html is
    written there too.

  Raises:
    CheckpointError: there is no checkpoint.
  """
  workdir = os.fspath(workdir)
  output = os.fspath(output or workdir)
  folders = _trained(workdir)
  own = storage.path(os.path.join(workdir, 'checkpoints'))
  if own.is_dir() or not folders:
    metrics = evaluate_workdir(workdir, output, **options)
    if jax.process_index() == 0:
      report_lib.try_write(output, [output], [workdir])
    return results_lib.format_table({metrics['category']: metrics})
  rows, targets = {}, []
  for folder in folders:
    target = os.path.join(output, os.path.basename(folder))
    metrics = evaluate_workdir(folder, target, **options)
    rows[metrics['category']] = metrics
    targets.append(target)
  if jax.process_index():
    return results_lib.format_table(rows)
  table = results_lib.write_tables(rows, output)
  report_lib.try_write(output, targets, folders)
  return table
