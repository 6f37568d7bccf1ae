"""A trained state and a test set -> an `Evaluation`; run.py writes it.

Synopsis:

  with evaluate.evaluate(predictor, state, calibration, records) as evaluation:
    print(evaluation.metrics['pixel_auroc'])
    evaluate.write_maps('maps', evaluation)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import math
import os
from typing import Any

import ml_collections
import numpy as np

from dmdd_jax import storage
from dmdd_jax import truth as truth_lib
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import loco
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import records as records_lib
from dmdd_jax.metrics import intervals
from dmdd_jax.metrics import results as results_lib
from dmdd_jax.metrics import store as store_lib
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import train_state

# Bytes of encoded thumbnails kept in memory; the rest goes to a file.
_THUMBNAIL_BYTES = 2**26
# False-positive rates up to which MVTec LOCO's sPRO is taken.
_SPRO_LIMITS = {'spro': 0.3, 'spro_005': 0.05}
_NO_THRESHOLD = 'no threshold: no image was held out'
_PIXEL_AT_THRESHOLD = ('pixel_precision', 'pixel_recall', 'pixel_f1')


@dataclasses.dataclass
class Evaluation:
  """What a model says of a test set: figures, scores, maps.

  The maps may lie in temporary files: use it in a `with`, which removes them.

  Attributes:
    config: of the model, with the `eval` it was evaluated by.
    calibration: by which the verdicts are made.
    records: the N test images.
    metrics: see `evaluate`.
    scores: image scores (N,) of the final map under 'map', and of the mean of
      the distance maps under 'maps_mean'.
    stores: the maps and masks of each (resolution, kind of map).
    thumbnails: (N,) arrays, what `encode` made of each image; None without it.
  """

  config: ml_collections.ConfigDict
  calibration: calibration_lib.Calibration
  records: Sequence[records_lib.Record]
  metrics: dict[str, Any]
  scores: Mapping[str, np.ndarray]
  stores: Mapping[tuple[str, str], results_lib.MapStore]
  thumbnails: store_lib.ArraySpool | None

  @property
  def store(self) -> results_lib.MapStore:
    """Final maps and masks at the first of `eval.resolutions`."""
    return self.stores[self.config.eval.resolutions[0], 'map']

  def __enter__(self) -> 'Evaluation':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Removes the temporary files; the metrics and scores stay."""
    with contextlib.ExitStack() as stack:
      for store in (*self.stores.values(), self.thumbnails):
        if store is not None:
          stack.callback(store.close)


def evaluate(
  predictor: predictor_lib.Predictor,
  state: train_state.TrainState,
  calibration: calibration_lib.Calibration,
  records: Sequence[records_lib.Record],
  encode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Evaluation:
  """Predicts and measures a test set; writes nothing.

  All processes of a mesh measure the same.

  Args:
    predictor: of the config.
    state: the trained state.
    calibration: stored with it.
    records: the test images; the folder of an image decides its label.
    encode: makes a thumbnail, one array, of an image (S, S, 3) uint8.

  Returns:
    An evaluation, whose `metrics` hold the keys of `metrics.results.compute`
    for the final map (those of pixels are NaN, with the reason, if a defective
    image has no mask); the same for the mean of the distance maps under
    `maps_mean`; precision, recall and F1 at the calibrated thresholds under
    `at_threshold`. With both resolutions asked for, the figures at the masks'
    own sizes stand under `native`.
  """
  config = predictor.config
  with contextlib.ExitStack() as stack:  # Closes them where something fails.
    stores = {
      (resolution, kind): stack.enter_context(results_lib.MapStore())
      for resolution in config.eval.resolutions
      for kind in ('map', 'maps_mean')
    }
    thumbnails = None
    if encode is not None:
      thumbnails = store_lib.ArraySpool(_THUMBNAIL_BYTES)
      stack.callback(thumbnails.close)
    predictions = predictor.over_records(state, calibration.fusion, records)
    scores = _collect(predictions, records, stores, thumbnails, encode)
    metrics = _measure(config, calibration, records, scores, stores)
    evaluation = Evaluation(
      config, calibration, records, metrics, scores, stores, thumbnails
    )
    if config.data.name == loco.NAME:
      truth_lib.add_spro(
        metrics, config.data, records, evaluation.store.maps, _SPRO_LIMITS
      )
    stack.pop_all()
  return evaluation


def write_maps(
  folder: str | os.PathLike, evaluation: Evaluation
) -> dict[str, str]:
  """Writes the final maps as float32 TIFF, in the layout of data/maps.py.

  Returns:
    {path: reason} of the maps that could not be written.
  """
  failures: dict[str, str] = {}
  category = evaluation.config.data.category
  stems = map_files.map_paths(folder, category, evaluation.records)
  for stem, anomaly_map in zip(stems, evaluation.store.maps, strict=True):
    path = f'{stem}.tiff'
    storage.attempt(failures, path, map_files.write_map, path, anomaly_map)
  return failures


def _measure(
  config: ml_collections.ConfigDict,
  calibration: calibration_lib.Calibration,
  records: Sequence[records_lib.Record],
  scores: Mapping[str, np.ndarray],
  stores: Mapping[tuple[str, str], results_lib.MapStore],
) -> dict[str, Any]:
  """The metrics of `evaluate` from the scores and maps of both kinds."""
  labels = np.array([record.label for record in records], int)
  unknown = truth_lib.unknown(records)
  by_resolution = {}
  for (resolution, kind), store in stores.items():
    metrics = results_lib.compute(
      store.maps,
      None if unknown else store.masks,
      scores[kind],
      labels,
      intervals=config.eval.intervals,
    )
    if unknown:
      truth_lib.explain(metrics, 'no masks', unknown)
    by_resolution.setdefault(resolution, {})[kind] = metrics
  by_resolution = {
    resolution: {**kinds['map'], 'maps_mean': kinds['maps_mean']}
    for resolution, kinds in by_resolution.items()
  }
  first, *others = config.eval.resolutions
  metrics = {
    **by_resolution[first],
    'resolution': first,
    'smoothing_sigma': config.eval.smoothing_sigma,
  }
  metrics |= {other: by_resolution[other] for other in others}
  metrics['at_threshold'] = _at_threshold(
    calibration,
    stores[first, 'map'],
    scores['map'],
    labels,
    unknown,
    config.calibration.image_fpr,
  )
  return metrics


def _collect(
  predictions: Iterable[tuple[dict[str, np.ndarray], score_lib.Prediction]],
  records: Sequence[records_lib.Record],
  stores: Mapping[tuple[str, str], results_lib.MapStore],
  thumbnails: store_lib.ArraySpool | None,
  encode: Callable[[np.ndarray], np.ndarray] | None,
) -> dict[str, np.ndarray]:
  """Fills the stores in the records' order; returns the scores by kind."""
  scores = {'map': [], 'maps_mean': []}
  remaining = iter(records)
  for batch, prediction in predictions:
    scores['map'].append(prediction.image_score)
    scores['maps_mean'].append(prediction.maps_mean_score)
    for row, mask in enumerate(batch['mask'][..., 0]):
      record = next(remaining)
      if thumbnails is not None:
        thumbnails.append(encode(batch['image'][row]))
      truths = {'model': mask}
      if any(resolution == 'native' for resolution, _ in stores):
        truths['native'] = images_lib.native_mask(record)
      for (resolution, kind), store in stores.items():
        anomaly_map = getattr(prediction, kind)[row]
        if resolution == 'native':
          shape = truths['native'].shape
          anomaly_map = map_files.resize_map(anomaly_map, shape)
        store.append(anomaly_map, truths[resolution])
  none = np.zeros(0, np.float32)  # A test split may be empty.
  return {k: np.concatenate([none, *parts]) for k, parts in scores.items()}


def _at_threshold(
  calibration: calibration_lib.Calibration,
  store: results_lib.MapStore,
  scores: np.ndarray,
  labels: np.ndarray,
  unknown: str | None,
  asked: float,
) -> dict[str, Any]:
  """Precision, recall and F1 at the calibrated thresholds.

  With the asked and the seen share of good images that are called defective,
  95 % intervals of the latter and of image recall under `confidence`, and what
  speaks against the threshold under `warnings`. Where the truth of
  pixels is `unknown`, for that reason, theirs are NaN.
  """
  scores = np.asarray(scores, np.float64)  # As verdicts are given.
  metrics = {
    'image_threshold': calibration.image_threshold,
    'pixel_threshold': calibration.pixel_threshold,
  }
  levels = {
    'image': (scores, labels, calibration.image_threshold),
    'pixel': (store.maps, store.masks, calibration.pixel_threshold),
  }
  reasons: dict[str, str] = {}
  for level, arguments in levels.items():
    figures = results_lib.precision_recall_f1(*arguments)
    if math.isnan(arguments[-1]):  # Nothing is at or above no threshold.
      figures = {'threshold': math.nan, **dict.fromkeys(figures, math.nan)}
      reasons |= {f'{level}_{name}': _NO_THRESHOLD for name in figures}
    metrics |= {f'{level}_{name}': value for name, value in figures.items()}
  if unknown:
    metrics.update(dict.fromkeys(_PIXEL_AT_THRESHOLD, math.nan))
    reasons |= dict.fromkeys(_PIXEL_AT_THRESHOLD, unknown)
  metrics |= _false_alarms(calibration, scores[labels == 0], asked, reasons)
  confidence = {}
  for name, label in (('image_recall', 1), ('image_false_positive_rate', 0)):
    part = scores[labels == label]
    if len(part) and not math.isnan(calibration.image_threshold):
      above = np.count_nonzero(part >= calibration.image_threshold)
      confidence[name] = list(intervals.share(int(above), len(part)))
  if confidence:
    metrics['confidence'] = confidence
  for name, value in metrics.items():
    known = name in reasons or not isinstance(value, float)
    if not known and math.isnan(value):
      reasons[name] = _why_undefined(name, labels)
  if reasons:
    metrics['undefined'] = reasons
  return metrics


def _false_alarms(
  calibration: calibration_lib.Calibration,
  good: np.ndarray,
  asked: float,
  reasons: dict[str, str],
) -> dict[str, Any]:
  """The asked and the seen rate of false alarms, and `warnings` if any.

  Without a rate its reason is added to `reasons`.
  """
  name, threshold = 'image_false_positive_rate', calibration.image_threshold
  metrics: dict[str, Any] = {f'{name}_asked': float(asked), name: math.nan}
  if math.isnan(threshold):
    reasons[name] = _NO_THRESHOLD
  elif not len(good):
    reasons[name] = 'no good images'
  else:
    metrics[name] = np.count_nonzero(good >= threshold) / len(good)
    if warnings := calibration_lib.doubts(calibration, good, asked):
      metrics['warnings'] = warnings
  return metrics


def _why_undefined(name: str, labels: np.ndarray) -> str:
  """Why a precision, recall or F1 at a threshold is NaN."""
  level, figure = name.split('_')
  nothing = f'no {level} reaches the threshold'
  if figure == 'precision':
    return nothing
  lacking = 'no defect pixels in the masks'
  if level == 'image':
    lacking = 'no defective images' if labels.size else 'no images'
  return lacking if figure == 'recall' else f'{lacking}, and {nothing}'


def training_images(
  config: ml_collections.ConfigDict, dataset: records_lib.Dataset
) -> tuple[np.ndarray, np.ndarray]:
  """The images trained on and those held out, by this config's seed.

  Returns:
    uint8 (N, S, S, 3) and (K, S, S, 3). N is 0 where no score of a training
    image is used: with tiles, or `calibration.training_images` 0.
  """
  data = config.data
  options = {'white_level': data.white_level}
  good = images_lib.validate(dataset.train, data.on_bad_image, **options)
  train, held_out = records_lib.hold_out(good, data, config.seed)
  if data.tile_size or not config.calibration.training_images:
    train = ()
  return tuple(
    images_lib.load_arrays(part, data.image_size, **options)[0]
    for part in (train, held_out)
  )
