"""Predicts any number of images, whole or in tiles, on any mesh of devices.

Synopsis:

  predictor = predictor.Predictor(config)
  prediction = predictor.predict_images(predictor, state, fusion, images)
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any

import jax
import ml_collections
import numpy as np

from dmdd_jax import sharding
from dmdd_jax.data import batches
from dmdd_jax.data import records as records_lib
from dmdd_jax.data import tiles
from dmdd_jax.models import dmdd
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import train_state


class Predictor:
  """A model with one jitted function, for whole images and for tiles.

  Attributes:
    config: the model's config.
    mesh: the mesh of devices.
    batch_size: number of images in one call; with tiles it is lower, because
      a row of the function is a tile.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
  ):
    """Builds the jitted function.

    Args:
      config: the model's config.
      mesh: a mesh of devices; all devices by default.
      batch_size: number of images or tiles in one call of the function; by
        default `config.eval.batch_size`.
    """
    self.config = config
    self.mesh = sharding.make_mesh() if mesh is None else mesh
    # Padded rows make any batch divide over the devices.
    rows = batch_size or config.eval.batch_size
    self._rows = math.ceil(rows / self.mesh.size) * self.mesh.size
    self._tiled = len(tiles.make_grid(config.data)) > 1
    size = config.data.image_size
    self.batch_size = self.images_at_once((size, size))
    model = dmdd.from_config(config)
    if self._tiled:
      self._measure = score_lib.make_measure_step(model, self.mesh)
      self._score = score_lib.make_score_step(config.eval)
    else:
      self._predict = score_lib.make_predict_step(config, model, self.mesh)

  def __call__(
    self,
    state: train_state.TrainState,
    fusion: score_lib.Fusion,
    images: np.ndarray,
  ) -> score_lib.Prediction:
    """Predicts images (N, S, S, 3) uint8, N <= `images_at_once`.

    With tiles, images may be (N, H, W, 3), with sides not below that of a tile.
    All processes of the mesh pass the same images and get all predictions.

    Returns:
      The prediction of all N images, as numpy arrays.
    """
    if self._tiled:
      return self._predict_tiled(state, fusion, images)
    return self._predict_whole(state, fusion, images)

  def images_at_once(self, shape: tuple[int, int]) -> int:
    """The number of images (H, W) that fill the function's rows; at least 1."""
    return max(1, self._rows // len(tiles.make_grid(self.config.data, shape)))

  def _predict_tiled(
    self,
    state: train_state.TrainState,
    fusion: score_lib.Fusion,
    images: np.ndarray,
  ) -> score_lib.Prediction:
    """Predicts images (N, H, W, 3) tile by tile."""
    shape = images.shape[1], images.shape[2]
    grid = tiles.make_grid(self.config.data, shape)
    joined = score_lib.Raw(*np.zeros((3, *images.shape[:3]), np.float32))
    places = [
      (n, tile) for n in range(len(images)) for tile in range(len(grid))
    ]
    variables = train_state.variables(state)
    for start in range(0, len(places), self._rows):
      batch = places[start : start + self._rows]
      parts = np.stack([grid.cut(images[n], tile) for n, tile in batch])
      rows = batches.pad_rows(parts, self._rows)
      raw = self._over_mesh(
        lambda rows: self._measure(variables, rows),
        sharding.local_rows(self.mesh, rows),
      )
      for row, (n, tile) in enumerate(batch):
        for name, maps in vars(joined).items():
          grid.add(maps[n], tile, getattr(raw, name)[row])
    return jax.device_get(self._score(fusion, joined))

  def _predict_whole(
    self,
    state: train_state.TrainState,
    fusion: score_lib.Fusion,
    images: np.ndarray,
  ) -> score_lib.Prediction:
    """Predicts (N, S, S, 3) of the model's input side, N <= rows."""
    rows = batches.pad_rows(images, self._rows)
    rows = sharding.local_rows(self.mesh, rows)
    prediction = self._predict_rows(state, fusion, rows)
    return jax.tree.map(lambda x: x[: len(images)], prediction)

  def _predict_rows(
    self,
    state: train_state.TrainState,
    fusion: score_lib.Fusion,
    rows: np.ndarray,
  ) -> score_lib.Prediction:
    """Predicts this process's rows; returns those of all, as numpy arrays."""
    variables = train_state.variables(state)
    return self._over_mesh(
      lambda rows: self._predict(variables, fusion, rows), rows
    )

  def _over_mesh(self, function: Callable, rows: np.ndarray) -> Any:
    """Runs `function` on the rows of all processes.

    Args:
      function: of a global array (rows of all processes, S, S, 3).
      rows: this process's rows.

    Returns:
      The result for the rows of all processes, as numpy arrays.
    """
    batch = sharding.to_global(self.mesh, {'image': rows})
    return sharding.to_host(self.mesh, function(batch['image']))

  def over_records(
    self,
    state: train_state.TrainState,
    fusion: score_lib.Fusion,
    records: Sequence[records_lib.Record],
  ) -> Iterator[tuple[dict[str, np.ndarray], score_lib.Prediction]]:
    """Yields (batch, prediction) without padding, every record once.

    Each process of the mesh decodes its share of a batch and yields the whole
    batch. With tiles, each process decodes all images and predicts its share of
    the tiles.
    """
    data, shard = self.config.data, sharding.shard(self.mesh)
    if self._tiled:
      shard = (0, 1)
    loaded = batches.eval_batches(
      records, data.image_size, self.batch_size, shard, data.white_level
    )
    if self._tiled:
      for batch in loaded:
        count = int(batch['_mask'].sum())
        batch = {key: value[:count] for key, value in batch.items()}
        yield batch, self(state, fusion, batch['image'])
      return
    for rows in loaded:
      prediction = self._predict_rows(state, fusion, rows['image'])
      whole = sharding.whole_rows(self.mesh, rows)
      # Only the last rows of the last batch are padding.
      count = int(whole['_mask'].sum())
      yield jax.tree.map(lambda x, count=count: x[:count], (whole, prediction))


def predict_images(
  predictor: Predictor,
  state: train_state.TrainState,
  fusion: score_lib.Fusion,
  images: np.ndarray,
) -> score_lib.Prediction:
  """Predicts any number of images (N, S, S, 3) uint8, N >= 1, as numpy."""
  rows = predictor.images_at_once((images.shape[1], images.shape[2]))
  parts = [
    predictor(state, fusion, images[i : i + rows])
    for i in range(0, len(images), rows)
  ]
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
