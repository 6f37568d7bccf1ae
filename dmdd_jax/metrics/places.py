"""Counts scores between sorted marks, without sorting the scores.

A score's place among K marks is 2 j if it lies between the marks j - 1 and j,
and 2 j + 1 if it equals mark j. NumPy's `searchsorted` takes as long as a sort
for this. Here a table gives the place of most scores at once: its cells
are ranges of the bits of a float32, narrow where the marks are dense. A score
whose cell holds a mark is compared with the mark. Only scores of a cell with
several marks are searched for. So the places are exact.

Synopsis:

  marks = places.prepare(np.unique(scores[labels == 1]))
  counts = np.zeros(2 * len(marks.values) + 1, np.int64)
  places.count(marks, scores, counts)
"""

from typing import NamedTuple

import numpy as np

# Scores to find places for at a time: they stay in a core's cache.
CHUNK = 2**16
# Cells of the table for each mark: more are fewer scores to compare, and a
# larger table, which is slower to look up.
_CELLS = 8
_HALF, _LOW = 16, 0xFFFF
_MAX_INT = 0x7FFFFFFF


class Marks(NamedTuple):
  """Marks and the table to find places among them.

  Attributes:
    values: (K,) the marks, ascending and distinct.
    first: (2**16,) the first cell of each upper half of a key; see `_keys`.
    shift: (2**16,) int32, by how many bits a key's lower half is shifted right
      to give the cell after the first.
    table: int32, the place of each cell, or -1 - j if it holds marks, mark j
      being the lowest of them. Empty: places are searched for.
    shared: (K,) bool, whether the next mark is in the same cell.
  """

  values: np.ndarray
  first: np.ndarray
  shift: np.ndarray
  table: np.ndarray
  shared: np.ndarray


def prepare(values: np.ndarray, tabled: bool = True) -> Marks:
  """Makes `Marks` of (K,) ascending, distinct, finite floats.

  Args:
    values: the marks, float32 or float64.
    tabled: whether to make the table, which pays for 2**16 scores and more.
  """
  if not tabled or not len(values):
    none = np.empty(0, np.int32)
    return Marks(values, none, none, none, none)
  keys = _keys(values)
  upper = (keys >> _HALF) & _LOW
  # Keys are signed: the negative upper halves, 2**15 and on, come first.
  marks = np.roll(np.bincount(upper, minlength=1 << _HALF), 1 << (_HALF - 1))
  bits = np.ceil(np.log2(np.maximum(marks * _CELLS, 1))).astype(np.int32)
  bits = np.minimum(bits, _HALF)
  widths = np.left_shift(1, bits, dtype=np.intp)
  first = np.roll(np.cumsum(widths) - widths, 1 << (_HALF - 1))
  shift = np.roll(_HALF - bits, 1 << (_HALF - 1))
  cells = first[upper] + ((keys & _LOW) >> shift[upper])
  shared = np.append(cells[1:] == cells[:-1], False)
  lowest = np.flatnonzero(np.append(True, ~shared[:-1]))
  cells = cells[lowest]
  table = np.zeros(int(widths.sum()) + 1, np.int32)
  table[cells + 1] = 2 * np.diff(lowest, append=len(values))
  np.cumsum(table, dtype=np.int32, out=table)
  table[cells] = -1 - lowest
  return Marks(values, first, shift, table, shared)


def _keys(scores: np.ndarray) -> np.ndarray:
  """(n,) int32 in the order of the scores; equal scores have equal keys.

  float64 is rounded, so that different scores may have equal keys.
  """
  # Adding 0 makes -0 a 0, and a copy. Beyond float32 an infinity is in order.
  with np.errstate(over='ignore'):
    rounded = scores.astype(np.float32, copy=False) + np.float32(0)
  keys = rounded.view(np.int32)
  flip = keys >> 31
  flip &= _MAX_INT
  keys ^= flip
  return keys


def find(marks: Marks, scores: np.ndarray) -> np.ndarray:
  """The places of (n,) finite scores, (n,) integers in [0, 2 K]."""
  values = marks.values
  if not len(marks.table):
    return _search(values, scores)
  keys = _keys(scores)
  upper = keys >> _HALF
  upper &= _LOW
  upper = upper.astype(np.intp)
  cells = marks.first[upper]
  keys &= _LOW
  keys >>= marks.shift[upper]
  cells += keys
  place = marks.table[cells]
  unsure = np.flatnonzero(place < 0)
  lowest = -1 - place[unsure]
  scores = scores[unsure]
  mark = values[lowest]
  above = scores > mark
  exact = 2 * lowest
  exact += above
  exact += scores >= mark
  several = np.flatnonzero(above & marks.shared[lowest])
  exact[several] = _search(values, scores[several])
  place[unsure] = exact
  return place


def _search(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """The places of scores by two binary searches."""
  place = np.searchsorted(values, scores)
  place += np.searchsorted(values, scores, 'right')
  return place


def upto(marks: Marks, scores: np.ndarray) -> np.ndarray:
  """The number of marks at or below each of (n,) scores, (n,) int64."""
  below = np.empty(len(scores), np.int64)
  for start in range(0, len(scores), CHUNK):
    part = slice(start, start + CHUNK)
    below[part] = find(marks, scores[part])
  below += 1
  below >>= 1
  return below


def count(marks: Marks, scores: np.ndarray, counts: np.ndarray) -> None:
  """Adds 1 to (2 K + 1,) counts at the place of each of n <= CHUNK scores."""
  np.add.at(counts, find(marks, scores), 1)
