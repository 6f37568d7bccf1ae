"""Anomaly maps and masks: a store larger than memory, and what is accepted.

Synopsis:

  with store.MapStore(limit_bytes=2**30, directory=workdir) as pairs:
    for anomaly_map, mask in ...:
      pairs.append(anomaly_map, mask)
    metrics = results.compute(pairs, None, scores, labels)
"""

import tempfile
from typing import Any, IO, Protocol

import numpy as np
import numpy.typing as npt

# All integers up to it are float64.
_EXACT_INTEGER = 2**53


class Arrays(Protocol):
  """N arrays by their index: one array, a list of arrays, or a spool."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> np.ndarray: ...


class ArraySpool:
  """Arrays in the order they were appended, in memory up to a limit.

  The arrays after the limit lie in one unnamed temporary file. They are read
  through memory maps. The file is deleted with the spool or the process.

  Attributes:
    bytes_in_memory: size of the arrays that are kept in memory.
    bytes_on_disk: size of the temporary file.
  """

  def __init__(self, limit_bytes: int, directory: str | None = None):
    """Makes an empty spool.

    Args:
      limit_bytes: bytes of arrays to keep in memory.
      directory: where the file goes; None means the system's temporary one.
    """
    self._limit = limit_bytes
    self._directory = directory
    # An array, or the offset, dtype and shape of one in the file.
    self._items: list[np.ndarray | tuple[int, np.dtype, tuple[int, ...]]] = []
    self._file: IO[bytes] | None = None
    self.bytes_in_memory = 0
    self.bytes_on_disk = 0

  def append(self, array: np.ndarray) -> None:
    """Copies one array of any dtype and shape into the spool."""
    if self.bytes_in_memory + array.nbytes <= self._limit:
      self.bytes_in_memory += array.nbytes
      self._items.append(np.array(array, order='C'))
      return
    if self._file is None:
      self._file = tempfile.TemporaryFile(
        dir=self._directory, prefix='dmdd_jax_maps_'
      )
    self._items.append((self.bytes_on_disk, array.dtype, array.shape))
    data = np.ascontiguousarray(array).tobytes()
    data += bytes(-len(data) % 16)
    try:
      self._file.seek(self.bytes_on_disk)
      self._file.write(data)
      self._file.flush()
    except OSError as error:
      raise OSError(
        error.errno,
        f'{error.strerror}: after {self.bytes_on_disk} bytes of maps in '
        f'{self._directory or tempfile.gettempdir()}; name a directory with '
        'more room',
      ) from error
    self.bytes_on_disk += len(data)

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, index: int) -> np.ndarray:
    item = self._items[index]
    if isinstance(item, np.ndarray):
      return item
    assert self._file is not None  # Of an item with an offset.
    offset, dtype, shape = item
    return np.memmap(self._file, dtype, 'r', offset, shape)

  def close(self) -> None:
    """Forgets all arrays and deletes the file."""
    self._items = []
    if self._file is not None:
      self._file.close()
      self._file = None


class _Every:
  """A sequence of every second item of a spool."""

  def __init__(self, spool: ArraySpool, start: int):
    self._spool, self._start = spool, start

  def __len__(self) -> int:
    return len(self._spool) // 2

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self._spool[2 * index + self._start]


class MapStore:
  """Pairs of an anomaly map and its mask, in order; may exceed the memory.

  Maps are kept in one way, in memory and on disk alike, so that the metrics do
  not depend on the limit.

  Attributes:
    maps: sequence of N (H_i, W_i) float arrays, float32 unless `exact`.
    masks: sequence of N (H_i, W_i) uint8 arrays in {0, 1}.
    limit_bytes: bytes of maps and masks that are kept in memory.
    directory: the folder of the temporary file; None for the system's.
    exact: whether float64 maps stay float64.
  """

  def __init__(
    self,
    limit_bytes: int = 2**30,
    directory: str | None = None,
    exact: bool = False,
  ):
    """Makes an empty store.

    Args:
      limit_bytes: bytes of maps and masks to keep in memory; the pairs after
        that go to a memory-mapped temporary file. 0 puts all of them there.
      directory: an existing folder for that file, with room for 5 bytes a
        pixel; None means the system's temporary folder.
      exact: keeps the values of every map, float64 ones at 9 bytes a pixel;
        otherwise maps are rounded to float32.
    """
    self._spool = ArraySpool(limit_bytes, directory)
    self.limit_bytes = limit_bytes
    self.directory = directory
    self.exact = exact
    self.maps: Arrays = _Every(self._spool, 0)
    self.masks: Arrays = _Every(self._spool, 1)

  def append(self, anomaly_map: npt.ArrayLike, mask: npt.ArrayLike) -> None:
    """Adds a pair.

    Args:
      anomaly_map: (H, W) finite scores; stored as float32 unless `exact`.
      mask: (H, W) in {0, 1}, 1 on defects; zeros for a good image.

    Raises:
      ValueError: on shapes that disagree, other mask values or scores that
        are not finite in float32; the message names the pair's index.
    """
    index = len(self)
    values = np.asarray(anomaly_map)
    if not self.exact:
      with np.errstate(over='ignore'):
        values = values.astype(np.float32, copy=False)
    values = check_map(values, index)
    mask = check_mask(mask, values.shape, index)
    self._spool.append(values)
    self._spool.append(mask)

  @property
  def spilled(self) -> bool:
    """Whether any pair lies in the temporary file."""
    return self._spool.bytes_on_disk > 0

  def __len__(self) -> int:
    return len(self.maps)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    return self.maps[index], self.masks[index]

  def close(self) -> None:
    """Forgets all pairs and deletes the file."""
    self._spool.close()

  def __enter__(self) -> 'MapStore':
    return self

  def __exit__(self, *unused_args: Any) -> None:
    self.close()


def as_float(scores: npt.ArrayLike) -> np.ndarray:
  """Returns `scores` as float32 or float64; copies only if needed.

  float16 and bfloat16 become float32, integers and wider floats become float64.
  float32 is never widened.
  """
  scores = np.asarray(scores)
  if scores.dtype in (np.float32, np.float64):
    return scores
  half = scores.dtype.name in ('float16', 'bfloat16')
  return scores.astype(np.float32 if half else np.float64)


def check_scores(scores: npt.ArrayLike, what: str) -> np.ndarray:
  """Returns `scores` as by `as_float`, checked to be finite numbers.

  Args:
    scores: numeric array of any shape.
    what: its name in the message of the error, such as 'the map of image 3'.

  Raises:
    ValueError: if it is not numeric, a masked array, or holds NaN, infinity or
      integers that float64 does not have.
  """
  scores = _unmasked(scores, what)
  if scores.dtype.kind not in 'fiub' and scores.dtype.name != 'bfloat16':
    raise ValueError(f'{what} is {scores.dtype}, expected numbers')
  if scores.dtype.kind in 'iu' and scores.dtype.itemsize == 8 and scores.size:
    furthest = max(int(scores.max()), -int(scores.min()))
    if furthest > _EXACT_INTEGER:
      raise ValueError(
        f'{what} holds an integer of size {furthest}, beyond 2**53, from where'
        ' on float64 merges different ones; pass their ranks'
      )
  scores = as_float(scores)
  # NaN and infinity show in these two, without an array for the answer.
  if scores.size and not np.isfinite([scores.min(), scores.max()]).all():
    raise ValueError(
      f'{what} holds {np.count_nonzero(~np.isfinite(scores))} values that are '
      'NaN or infinite; every score must be finite'
    )
  return scores


def _unmasked(array: npt.ArrayLike, what: str) -> np.ndarray:
  """Returns an array; ValueError if it is a masked one."""
  if isinstance(array, np.ma.MaskedArray):
    raise ValueError(
      f'{what} is a masked array, whose mask would be ignored; leave the masked'
      ' entries out, or pass .filled(value)'
    )
  return np.asarray(array)


def check_map(anomaly_map: npt.ArrayLike, index: int) -> np.ndarray:
  """Returns a map as a finite (H, W) float array, or raises ValueError."""
  values = check_scores(anomaly_map, f'the map of image {index}')
  if values.ndim != 2:
    raise ValueError(
      f'the map of image {index} has shape {values.shape}, expected (H, W)'
    )
  if not values.size:
    raise ValueError(f'the map of image {index} has no pixels')
  return values


def check_mask(
  mask: npt.ArrayLike | None, shape: tuple[int, ...], index: int
) -> np.ndarray:
  """Returns a mask as (H, W) uint8 in {0, 1}, or raises ValueError.

  Args:
    mask: (H, W) bool or numbers in {0, 1}.
    shape: the shape of its map.
    index: the image's index, for the message.
  """
  if mask is None:
    raise ValueError(
      f'the mask of image {index} is None; pass zeros for a good image'
    )
  mask = _unmasked(mask, f'the mask of image {index}')
  if mask.shape != tuple(shape):
    raise ValueError(
      f'image {index}: the map has shape {tuple(shape)} and the mask '
      f'{mask.shape}; they must agree'
    )
  if mask.dtype == np.bool_:
    return mask.view(np.uint8)
  binary = mask != 0
  if not np.array_equal(mask, binary):
    other = mask[(mask != 0) & (mask != 1)][0]
    raise ValueError(
      f'the mask of image {index} holds {other}, expected only 0 and 1; '
      'pass mask > 0'
    )
  return binary.view(np.uint8)


def check_labels(labels: npt.ArrayLike) -> np.ndarray:
  """Returns labels as (N,) uint8 in {0, 1}, or raises ValueError."""
  labels = _unmasked(labels, 'the array of labels')
  if labels.ndim != 1:
    raise ValueError(f'labels have shape {labels.shape}, expected (N,)')
  if labels.dtype == np.bool_:
    return labels.view(np.uint8)
  positive = labels == 1
  if np.count_nonzero(positive) + np.count_nonzero(labels == 0) < labels.size:
    index = int(np.flatnonzero(~np.isin(labels, (0, 1)))[0])
    raise ValueError(
      f'the label of image {index} is {labels[index]}, expected 0 (good) or 1'
    )
  return positive.view(np.uint8)
