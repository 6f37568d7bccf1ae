"""A line of JSON for each inspection and each refusal, if it is asked for.

Synopsis:

  journal = journal_lib.open_journal('inspections.jsonl')
  journal({'status': 200, 'category': 'screw', 'score': 1.3})
"""

from collections.abc import Callable, Mapping
import datetime
import json
import sys
from typing import Any

from absl import logging

Journal = Callable[[Mapping[str, Any]], None]


def open_journal(path: str | None) -> Journal:
  """A function that writes an entry, with the time, as one line.

  A disk that is full is logged, and does not end the service.

  Args:
    path: a file that is appended to; '-' is standard error; None writes
      nothing.

  Raises:
    OSError: the file cannot be opened.
  """
  if path is None:
    return lambda entry: None
  if path == '-':
    file = sys.stderr
  else:
    file = open(path, 'a', encoding='utf-8', buffering=1)

  def write(entry: Mapping[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC)
    line = json.dumps({'time': now.isoformat(timespec='milliseconds'), **entry})
    try:
      file.write(line + '\n')
    except OSError as error:
      logging.error('--log=%s: an entry was not written: %s', path, error)

  return write
