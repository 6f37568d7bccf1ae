"""Cuts large images into overlapping tiles and joins the maps of tiles.

The model sees a square of `data.tile_size` pixels at a time. Tiles are spread
evenly, so that all of them lie inside the image, whatever its side. A tile's
weight is highest in its middle and falls towards its edges (raised cosine). At
every pixel the weights of all tiles sum to one, so a joined map has no seams,
and a map on which all tiles agree does not change.

Synopsis:

  grid = tiles.make_grid(config.data)
  parts = [grid.cut(image, tile) for tile in range(len(grid))]
  whole = np.zeros(grid.shape, np.float32)
  for tile, part in enumerate(parts):
    grid.add(whole, tile, predict(part))
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

MAX_OVERLAP = 0.75  # Every pixel in 16 tiles.


class Grid:
  """The places of the tiles in images of one size.

  Attributes:
    shape: (height, width) of an image, in pixels.
    side: height and width of a tile, in pixels.
    corners: the (y, x) of each tile's first pixel.
  """

  def __init__(self, shape: tuple[int, int], side: int, overlap: float):
    """Spreads as few tiles as `overlap` allows.

    Args:
      shape: (height, width), each at least `side`.
      side: height and width of a tile, in pixels.
      overlap: the least share of its side that a tile has in common with the
        next tile; in [0, 0.75].
    """
    self.shape, self.side = shape, side
    rows, columns = (_starts(length, side, overlap) for length in shape)
    self.corners = tuple((y, x) for y in rows for x in columns)
    down, across = (
      _weights(length, side, starts)
      for length, starts in zip(shape, (rows, columns))
    )
    self._weights = [(v, h) for v in down for h in across]

  def __len__(self) -> int:
    return len(self.corners)

  def cut(self, image: np.ndarray, tile: int) -> np.ndarray:
    """A tile of an image (H, W, ...), as a view (side, side, ...)."""
    y, x = self.corners[tile]
    return image[y : y + self.side, x : x + self.side]

  def add(self, whole: np.ndarray, tile: int, values: np.ndarray) -> None:
    """Adds a tile's weighted share (side, side) to a map (H, W), in place."""
    down, across = self._weights[tile]
    part = self.cut(whole, tile)
    part += down[:, None] * across * values


def input_side(data: Mapping[str, Any]) -> int:
  """The side of the model's input: of a tile, or of the whole image."""
  return data['tile_size'] or data['image_size']


def make_grid(
  data: Mapping[str, Any], shape: tuple[int, int] | None = None
) -> Grid:
  """The grid of `config.data`; a single tile if `tile_size` is 0.

  Args:
    data: `image_size`, `tile_size` and `tile_overlap` are read.
    shape: (height, width) of the images; by default `image_size` squared.
  """
  size = data['image_size']
  return Grid(shape or (size, size), input_side(data), data['tile_overlap'])


def split(data: Mapping[str, Any], images: np.ndarray) -> np.ndarray:
  """All tiles (N * T, side, side, C) of images (N, S, S, C), image by image."""
  grid = make_grid(data)
  if len(grid) == 1:
    return images
  parts = np.empty(
    (len(images), len(grid), grid.side, grid.side, images.shape[-1]),
    images.dtype,
  )
  for image, cuts in zip(images, parts):
    for tile in range(len(grid)):
      cuts[tile] = grid.cut(image, tile)
  return parts.reshape(-1, *parts.shape[2:])


def _starts(length: int, side: int, overlap: float) -> list[int]:
  """First pixels of the tiles along an axis: from 0 to length - side."""
  step = side - math.ceil(overlap * side)
  count = 1 + math.ceil((length - side) / step)
  return [i * (length - side) // max(count - 1, 1) for i in range(count)]


def _weights(length: int, side: int, starts: list[int]) -> np.ndarray:
  """(len(starts), side) float32 weights that sum to one at each pixel."""
  window = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
  total = np.zeros(length)
  for start in starts:
    total[start : start + side] += window
  shares = [window / total[start : start + side] for start in starts]
  return np.array(shares, np.float32)
