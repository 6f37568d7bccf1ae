"""Batches of images for evaluation and prediction, without TensorFlow.

Decoding runs in threads, one batch ahead of its use. The last batch is padded
to full size, and `_mask` marks the real rows, so that a jitted step sees one
shape and every image counts once.

Synopsis:

  for batch in batches.eval_batches(records, size=256, batch_size=16): ...
"""

from collections.abc import Iterator, Sequence
import concurrent.futures

import numpy as np

from dmdd_jax.data import images as images_lib
from dmdd_jax.data import records as records_lib


def eval_batches(
  records: Sequence[records_lib.Record],
  size: int,
  batch_size: int,
  shard: tuple[int, int] = (0, 1),
  white_level: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the records in order, ceil(N / batch_size) batches.

  Each batch holds image (B, S, S, 3) uint8, mask (B, S, S, 1) uint8 in
  {0, 1}, label (B,) int32 and _mask (B,) float32, 1 for a real row.

  Args:
    records: N records.
    size: side S of the images.
    batch_size: rows of all shards together, a multiple of their count.
    shard: (index, count) of this process. B is batch_size / count, and every
      shard yields the same number of batches.
    white_level: see `images.read_image`.
  """
  index, count = shard
  share = batch_size // count

  def load(start: int) -> dict[str, np.ndarray]:
    start += index * share
    rows = records[start : start + share]
    images, masks = images_lib.load_arrays(rows, size, white_level=white_level)
    batch = {
      'image': images,
      'mask': masks,
      'label': np.array([row.label for row in rows], np.int32),
      '_mask': np.ones(len(rows), np.float32),
    }
    return {key: pad_rows(rows, share) for key, rows in batch.items()}

  starts = range(0, len(records), batch_size)
  with concurrent.futures.ThreadPoolExecutor(1) as ahead:
    pending = [ahead.submit(load, start) for start in starts[:1]]
    for start in starts[1:]:
      following = ahead.submit(load, start)
      yield pending.pop().result()
      pending.append(following)
    for last in pending:
      yield last.result()


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
  """Pads an array (N, ...) with zeros to (rows, ...), N <= rows."""
  missing = rows - len(array)
  return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
