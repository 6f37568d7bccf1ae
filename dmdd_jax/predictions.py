"""The table of an inspection: predictions.csv grows row by row, and goes on.

A row stands in the table as soon as its image is inspected and its map and
picture are written. A run that was killed leaves the rows of what it has done;
the next one with the same output continues after them. predictions.json has the
checkpoint and thresholds from the beginning, and the rows at the end.

Synopsis:

  table = predictions.Table('out', {'step': 100}, resume=True)
  for path in table.pending(paths):
    table.append({'file': path, 'score': 1.2, ...})
  rows = table.finish(failed, ignored, finished=True)
"""

from collections.abc import Iterable, Mapping, Sequence
import csv
import io
import json
import os
from typing import Any

from absl import logging

from dmdd_jax import storage
from dmdd_jax.metrics import results as results_lib

# New columns come at the end: programs may read by position.
_TYPES = {
  'file': str,
  'score': float,
  'threshold': float,
  'scaled': float,
  'verdict': str,
  'height': int,
  'width': int,
  'bytes': int,
  'modified_ns': int,
  'error': str,
}


def identity(path: str) -> tuple[int, int]:
  """Size in bytes and time of change in ns: other content has another one.

  Raises:
    OSError: the file is not there.
  """
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def format_line(row: Mapping[str, Any]) -> str:
  """A row as one line of JSON with all columns; NaN and what lacks is null."""
  return json.dumps(results_lib.plain({name: row.get(name) for name in _TYPES}))


class Table:
  """predictions.csv and predictions.json in a folder.

  Attributes:
    path: of the CSV file.
  """

  def __init__(self, folder: str, description: Mapping[str, Any], resume: bool):
    """Opens the folder's table to go on, or begins a new one.

    Args:
      folder: is made if missing.
      description: what all rows of a table share: checkpoint, thresholds.
      resume: whether to go on with a table that is there, or to replace it.

    Raises:
      ValueError: there is a table with another description.
      OSError: a file cannot be read or written.
    """
    self.path = os.path.join(folder, 'predictions.csv')
    self._document = os.path.join(folder, 'predictions.json')
    self._description = json.loads(results_lib.format_json(description))
    # Of each file's last row: its identity, and whether it is complete.
    self._done: dict[str, tuple[tuple[int, int], bool]] = {}
    file = storage.path(self.path)
    if resume and file.exists():
      self._check_description()
      for row in self._read(mend=True):
        self._note(row)
      return
    if file.exists():  # Never rows beside another's description.
      file.unlink()
    self._write_document([], {}, (), finished=False)
    storage.write_text(self.path, _format(list(_TYPES)))

  def pending(self, paths: Iterable[str]) -> list[str]:
    """Those of the files that are still to be inspected.

    That is: not in the table, changed since, or in it without their map or
    picture. A row of the last kind is removed, because a new one comes.
    """
    pending, again = [], set()
    for path in paths:
      known, complete = self._done.get(os.path.abspath(path), (None, False))
      try:
        same = known is not None and identity(path) == known
      except OSError:
        same = False
      if not (same and complete):
        pending.append(path)
      if same and not complete:
        again.add(os.path.abspath(path))
    if again:
      kept = [
        row
        for row in self._read()
        if not (row['error'] and os.path.abspath(row['file']) in again)
      ]
      self._write(kept)
    return pending

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row, {column: value}.

    Raises:
      OSError: it cannot be written; a part of it is ignored the next time.
    """
    storage.append_text(self.path, _format([row[name] for name in _TYPES]))
    self._note(row)

  def finish(
    self, failed: Mapping[str, str], ignored: Sequence[str], finished: bool
  ) -> list[dict[str, Any]]:
    """Writes predictions.json.

    Args:
      failed: {file: reason} of those that could not be read.
      ignored: files that are no images.
      finished: whether all files were looked at.

    Returns:
      All rows of the table.
    """
    rows = self._read()
    self._write_document(rows, failed, ignored, finished)
    return rows

  def _note(self, row: Mapping[str, Any]) -> None:
    known = row['bytes'], row['modified_ns']
    self._done[os.path.abspath(row['file'])] = known, not row['error']

  def _check_description(self) -> None:
    """Refuses to mix rows of two checkpoints or kinds of output."""
    try:
      stored = json.loads(storage.path(self._document).read_bytes())
    except (FileNotFoundError, ValueError):
      stored = {}
    for name, value in self._description.items():
      if name not in stored or stored[name] != value:
        before = json.dumps(stored.get(name, 'not known'))
        raise ValueError(
          f'{self.path} is of another command: {name} was {before}, is now'
          f' {json.dumps(value)}. Start it anew with --noresume, or name'
          ' another --output.'
        )

  def _read(self, mend: bool = False) -> list[dict[str, Any]]:
    """The complete rows, with numbers.

    A program that was killed, or had no more disk, may have left half a row at
    the end, which is no row; `mend` removes it from the file.
    """
    content = storage.path(self.path).read_bytes()
    text = content.decode('utf-8', 'surrogateescape')
    lines = list(csv.reader(io.StringIO(text, newline='')))
    cut = bool(text) and not text.endswith('\n')
    if lines and (cut or len(lines[-1]) != len(_TYPES)):
      dropped = lines.pop()
      if mend:
        logging.warning('%s: half a row removed: %s', self.path, dropped)
    header, *lines = lines or [list(_TYPES)]
    if header != list(_TYPES) or any(len(x) != len(_TYPES) for x in lines):
      raise ValueError(
        f'{self.path}: expected the columns {",".join(_TYPES)}. Start it anew'
        ' with --noresume, or name another --output.'
      )
    rows = [
      {
        name: kind(value)
        for (name, kind), value in zip(_TYPES.items(), line, strict=True)
      }
      for line in lines
    ]
    if mend and text != _format(header) + ''.join(map(_format, lines)):
      self._write(rows)
    return rows

  def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [list(_TYPES), *([row[name] for name in _TYPES] for row in rows)]
    storage.write_text(self.path, ''.join(map(_format, lines)))

  def _write_document(
    self,
    rows: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
    ignored: Sequence[str],
    finished: bool,
  ) -> None:
    document = {
      **self._description,
      'finished': finished,
      'predictions': list(rows),
      'failed': dict(failed),
      'ignored': list(ignored),
    }
    storage.write_text(self._document, results_lib.format_json(document))


def _format(values: Sequence[Any]) -> str:
  """A line of the table."""
  text = io.StringIO()
  # csv quotes a carriage return in a name only where its line ends have one.
  csv.writer(text, lineterminator='\r\n').writerow(values)
  return text.getvalue().removesuffix('\r\n') + '\n'
