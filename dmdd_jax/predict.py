"""From a checkpoint to scores, verdicts, maps and overlays of new images.

Synopsis:

  inspector = predict.load('runs/mvtec/screw')
  result = inspector(['new/part_17.png'])[0]
  print(result.score, result.verdict, result.map.shape)

  summary = predict.predict('runs/mvtec/screw', 'new/*.png', 'out')
  predict.predict('runs/mvtec/screw', 'new', 'out', watches=True)
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import os
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np
import tqdm

from dmdd_jax import predictions
from dmdd_jax import sharding
from dmdd_jax import storage
from dmdd_jax import verdict as verdict_lib
from dmdd_jax import watch
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import tiles
from dmdd_jax.launch import preemption
from dmdd_jax.report import overlays as overlays_lib
from dmdd_jax.scoring import calibration as calibration_lib
from dmdd_jax.scoring import predictor as predictor_lib
from dmdd_jax.scoring import trained as trained_lib
from dmdd_jax.training import train_state

MAP_FORMATS = ('tiff', 'npy', 'none')
# Threads that decode, threads that write, and images that wait to be written.
# Each holds an image or a map at its own size, so they bound the memory.
_READERS, _WRITERS, _WAITING = 8, 2, 4


@dataclasses.dataclass(frozen=True)
class Result:
  """Score, verdict and map of one image.

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
    sizes = [size for _, size in prepared]
    results = self.inspect([image for image, _ in prepared])
    return [
      dataclasses.replace(one, map=map_files.resize_map(one.map, size))
      for one, size in zip(results, sizes, strict=True)
    ]

  def resize(self, image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) or (H, W) uint8 at the size that `inspect` takes."""
    return images_lib.resize_image(image, self.config.data.image_size)

  def inspect(self, images: Sequence[np.ndarray]) -> list[Result]:
    """Inspects images of `resize`; their maps have that size too."""
    results = []
    for start in range(0, len(images), self.batch_size):
      results += self._run(images[start : start + self.batch_size])
    return results

  def _prepare(
    self, image: str | os.PathLike | np.ndarray
  ) -> tuple[np.ndarray, tuple[int, int]]:
    """The image at the model's size, and its own (height, width)."""
    if not isinstance(image, np.ndarray):
      white_level = self.config.data.white_level
      image = images_lib.read_image(image, None, white_level)
    else:
      images_lib.check_array(image)
    return self.resize(image), image.shape[:2]

  def _run(self, images: Sequence[np.ndarray]) -> list[Result]:
    predictor = self._predictors[0 if len(images) == 1 else -1]
    prediction = predictor(
      self._state, self.calibration.fusion, np.stack(images)
    )
    return [
      Result(
        score=float(score),
        verdict=self.verdict(float(score)),
        scaled=self.calibration.scaled(float(score)),
        map=anomaly_map,
      )
      for score, anomaly_map in zip(prediction.image_score, prediction.map)
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
  *,
  resume: bool = True,
  watches: bool = False,
  on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Inspects files and writes predictions.csv, .json, maps and overlays.

  Rows are written as they are known. The same command goes on where another
  one ended: an image in the table is not inspected again unless it has changed
  or its map or overlay could not be written.

  Args:
    workdir: a trained category's folder.
    pattern: see `files.list_inputs`.
    output: a folder, made if missing; gets maps/ and overlays/ with the
      images' paths below the folder that `pattern` names.
    map_format: one of `MAP_FORMATS`.
    overlays: write a picture per image, one colour scale for all.
    resume: whether to go on with a table in `output`, or to begin a new one.
    watches: take files as they arrive, until Ctrl-C or SIGTERM, see `watch`.
    on_row: called with each new row, {column: value}, when it is in the table,
      and for a file that could not be read with {'file', 'error'}.

  Returns:
    {'images', 'defective', 'failed': {file: reason}, 'incomplete': {file:
    which of its map and overlay could not be written, and why}, 'table': path
    of the CSV}

  Raises:
    ValueError: the table in `output` is of another checkpoint or map format.
    OSError: the table cannot be written.
    Preempted: Ctrl-C or SIGTERM came; the table has what was done by then.
  """
  if map_format not in MAP_FORMATS:
    raise ValueError(
      f'--maps={map_format!r}: choose one of {", ".join(MAP_FORMATS)}'
    )
  output = os.fspath(output)
  if watches:
    watch.check(pattern)
    batches = watch.arrivals(watch.lister(pattern, output))
    listing = None
  else:
    listing = files.list_inputs(pattern, output)
    batches = [listing.images]
  inspector = load(workdir)
  table = predictions.Table(
    output, _describe(inspector, map_format, overlays), resume
  )
  writer = _Writer(inspector, output, map_format, overlays)
  base = _base(pattern, listing.images if listing else ())
  failed: dict[str, str] = {}

  def note(row: dict[str, Any]) -> None:
    if 'score' in row:
      table.append(row)
      failed.pop(row['file'], None)
    else:
      failed[row['file']] = row['error']
    if on_row is not None:
      on_row(row)

  with preemption.watched(interrupts=True):
    if listing is None:
      logging.info('watching %s; Ctrl-C or SIGTERM ends it', pattern)
    else:
      for name, reason in listing.faults.items():
        note({'file': name, 'error': reason})
    for paths in batches:
      _inspect_batch(inspector, table, paths, base, writer, note)
    ended = preemption.received()
    rows = table.finish(
      failed, listing.others if listing else (), finished=watches or not ended
    )
    asked = None if listing is None else listing.images
    summary = _summarize(rows, asked, failed, table.path)
    if ended and listing is not None:
      preemption.leave(
        f'{summary["images"]} of {len(listing.images)} images are in'
        f' {table.path}'
      )
  return summary


def _inspect_batch(
  inspector: Inspector,
  table: predictions.Table,
  paths: Sequence[str],
  base: str,
  writer: '_Writer',
  note: Callable[[dict[str, Any]], None],
) -> None:
  """Inspects those of the files that are not in the table; notes each row."""
  pending = table.pending(paths)
  if not pending and not paths:  # Nothing arrived.
    return
  known = len(paths) - len(pending)
  if known:
    logging.info(
      '%d of %d images are in %s already', *(known, len(paths), table.path)
    )
  with tqdm.tqdm(total=len(paths), initial=known, unit='image') as progress:
    for row in _inspect_files(inspector, pending, base, writer):
      note(row)
      progress.update()


def _describe(
  inspector: Inspector, map_format: str, overlays: bool
) -> dict[str, Any]:
  """What the rows of a table must have in common."""
  return {
    'category': inspector.config.data.category,
    'step': inspector.step,
    'calibration': inspector.calibration.to_dict(),
    'maps': map_format,
    'overlays': overlays,
  }


def _base(pattern: str, paths: Sequence[str]) -> str:
  """The folder below which the paths of outputs are those of the images.

  It is the one that `pattern` names, not what the images of today share: new
  ones must not move the outputs of older ones.
  """
  folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
  if not os.path.isfile(os.path.expanduser(pattern)):
    folders.append(watch.fixed_folder(pattern))
  return os.path.commonpath(folders)


def _summarize(
  rows: Sequence[Mapping[str, Any]],
  paths: Sequence[str] | None,
  failed: dict[str, str],
  table: str,
) -> dict[str, Any]:
  """Counts the last rows of the files, or of all; see `predict`."""
  # As `predictions.Table` knows them: one file has several spellings.
  last = {os.path.abspath(row['file']): row for row in rows}
  if paths is not None:
    asked = map(os.path.abspath, paths)
    last = {path: last[path] for path in asked if path in last}
  incomplete = {r['file']: r['error'] for r in last.values() if r['error']}
  defective = sum(r['verdict'] == verdict_lib.DEFECTIVE for r in last.values())
  logging.info(
    '%d images, %d defective, %d could not be read, %d without map or overlay;'
    ' %s',
    *(len(last), defective, len(failed), len(incomplete), table),
  )
  return {
    'images': len(last),
    'defective': defective,
    'failed': failed,
    'incomplete': incomplete,
    'table': table,
  }


@dataclasses.dataclass(frozen=True)
class _Item:
  """A file that was read: only what is needed, not the image itself.

  Attributes:
    path: of the file.
    identity: see `predictions.identity`.
    size: height and width of the image.
    image: at the model's size.
    shown: at the size that an overlay shows; None without overlays.
  """

  path: str
  identity: tuple[int, int]
  size: tuple[int, int]
  image: np.ndarray
  shown: np.ndarray | None


def _read(inspector: Inspector, path: str, shows: bool) -> _Item | Exception:
  """Reads and shrinks an image; its error is returned."""
  try:
    identity = predictions.identity(path)
    white_level = inspector.config.data.white_level
    image = images_lib.read_image(path, None, white_level)
  except (files.BadImageError, OSError) as error:
    return error
  return _Item(
    path,
    identity,
    image.shape[:2],
    inspector.resize(image),
    overlays_lib.shrink_image(image) if shows else None,
  )


def _inspect_files(
  inspector: Inspector, paths: Sequence[str], base: str, writer: '_Writer'
) -> Iterator[dict[str, Any]]:
  """Yields the row of every file in order, once its map and overlay are there.

  Decoding runs a batch ahead of the model, writing at most `_WAITING` images
  behind it: neither memory nor what is left to do after Ctrl-C grows with the
  number or size of images. Ends early where a signal came.
  """
  size = inspector.batch_size
  readers = concurrent.futures.ThreadPoolExecutor(_threads())
  writers = concurrent.futures.ThreadPoolExecutor(_WRITERS)
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    ahead = _submit(readers, inspector, paths[:size], writer.overlays)
    for start in range(0, len(paths), size):
      if preemption.received():
        break
      names, items = paths[start : start + size], [x.result() for x in ahead]
      following = paths[start + size : start + 2 * size]
      ahead = _submit(readers, inspector, following, writer.overlays)
      read = [item for item in items if isinstance(item, _Item)]
      results = iter(inspector.inspect([item.image for item in read]))
      for path, item in zip(names, items, strict=True):
        if preemption.received():
          break
        if isinstance(item, Exception):
          logging.error('skipped: %s', item)
          row = {'file': path, 'error': str(item)}
          waiting.append(writers.submit(dict, row))
        else:
          name = os.path.relpath(os.path.abspath(path), base)
          job = (writer.write, name, item, next(results))
          waiting.append(writers.submit(*job))
        while len(waiting) > _WAITING:
          yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    for pool in (readers, writers):
      pool.shutdown(cancel_futures=True)


def _submit(
  readers: concurrent.futures.Executor,
  inspector: Inspector,
  paths: Sequence[str],
  shows: bool,
) -> list[concurrent.futures.Future]:
  return [readers.submit(_read, inspector, path, shows) for path in paths]


def _threads() -> int:
  return min(_READERS, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class _Writer:
  """Writes the map and the overlay of an image, and makes its row.

  Attributes:
    inspector: gives thresholds and colours.
    output: the folder.
    map_format: one of `MAP_FORMATS`.
    overlays: whether there are any.
  """

  inspector: Inspector
  output: str
  map_format: str
  overlays: bool

  def write(self, name: str, item: _Item, result: Result) -> dict[str, Any]:
    """Writes the outputs of the image NAME; returns its row."""
    failures: dict[str, str] = {}
    if self.map_format != 'none':
      target = self._target('maps', name, f'.{self.map_format}')
      storage.attempt(failures, target, _write_map, target, item, result)
    if self.overlays:
      target = self._target('overlays', name, '.png')
      storage.attempt(
        failures, target, self._write_overlay, target, name, item, result
      )
    return {
      'file': item.path,
      'score': result.score,
      'threshold': self.inspector.calibration.image_threshold,
      'scaled': result.scaled,
      'verdict': result.verdict,
      'height': item.size[0],
      'width': item.size[1],
      'bytes': item.identity[0],
      'modified_ns': item.identity[1],
      'error': '; '.join(
        reason if target in reason else f'{target}: {reason}'
        for target, reason in failures.items()
      ),
    }

  def _target(self, kind: str, name: str, suffix: str) -> str:
    return os.path.join(self.output, kind, storage.fit_name(name, suffix))

  def _write_overlay(
    self, target: str, name: str, item: _Item, result: Result
  ) -> None:
    calibration = self.inspector.calibration
    text = f'score {result.score:.2f}, {result.verdict}'
    picture = overlays_lib.overlay(
      item.shown,
      result.map,
      None,
      pixel_threshold=calibration.pixel_threshold,
      limits=overlays_lib.calibrated_range(calibration),
      name=name,
      text=text,
      size=item.size,
    )
    overlays_lib.save(picture, target, f'{name}: {text}')


def _write_map(target: str, item: _Item, result: Result) -> None:
  map_files.write_map(target, map_files.resize_map(result.map, item.size))
