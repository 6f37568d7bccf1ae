"""Predicts any number of images of any layout of tiles, on any mesh.

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
  """A model behind one jitted function, for whole images and for tiles.

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
    fusion: score_lib.Fusion,
    images: np.ndarray,
  ) -> score_lib.Prediction:
    """Predicts images (N, H, W, 3) tile by tile, never one as a whole."""
    grid = tiles.make_grid(self.config.data, images.shape[1:3])
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
    """Predicts this process's rows of a batch; all rows, as numpy arrays."""
    variables = train_state.variables(state)
    return self._over_mesh(
      lambda rows: self._predict(variables, fusion, rows), rows
    )

  def _over_mesh(self, function: Callable, rows: np.ndarray) -> Any:
    """`function` of this process's rows; its result of all, as numpy arrays."""
    batch = sharding.to_global(self.mesh, {'image': rows})
    return sharding.to_host(self.mesh, function(batch['image']))

  def over_records(
    self,
    state: train_state.TrainState,
    fusion: score_lib.Fusion,
    records: Sequence[records_lib.Record],
  ) -> Iterator[tuple[dict[str, np.ndarray], score_lib.Prediction]]:
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
      prediction = self._predict_rows(state, fusion, rows['image'])
      batch = sharding.whole_rows(self.mesh, rows)
      # Only the last rows of the last batch are padding.
      count = int(batch['_mask'].sum())
      yield jax.tree.map(lambda x, count=count: x[:count], (batch, prediction))


def predict_images(
  predictor: Predictor,
  state: train_state.TrainState,
  fusion: score_lib.Fusion,
  images: np.ndarray,
) -> score_lib.Prediction:
  """Predicts any number of uint8 images (N, S, S, 3), N >= 1."""
  rows = predictor.images_at_once(images.shape[1:3])
  parts = [
    predictor(state, fusion, images[i : i + rows])
    for i in range(0, len(images), rows)
  ]
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
