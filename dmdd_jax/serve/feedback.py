"""What operators say of verdicts, kept as a data set.

An image that was judged wrongly is kept as it was sent, in the layout of MVTec
AD: DIR/CATEGORY/test/good or test/defective. DIR/CATEGORY/feedback.jsonl has a
line for each opinion: time, file, score, verdict, reason. docs/deploy.md says
how training and evaluation read it.

Synopsis:

  keep = feedback.open_folder('feedback', ['screw'])
  file = keep('screw', 'defective', content, {'score': 0.3, 'reason': 'dent'})
"""

from collections.abc import Callable, Iterable, Mapping
import datetime
import hashlib
import json
import os
import tempfile
import threading
from typing import Any

OPINIONS = ('good', 'defective')
_LOG = 'feedback.jsonl'
# How files of the formats that are accepted begin; others are TIFF.
_SUFFIXES = {
  b'\x89PNG': '.png',
  b'\xff\xd8': '.jpg',
  b'BM': '.bmp',
  b'RIFF': '.webp',
}

# Category, opinion, the image file and further fields in; its path out.
Keep = Callable[[str, str, bytes, Mapping[str, Any]], str]


def open_folder(folder: str | os.PathLike, categories: Iterable[str]) -> Keep:
  """A function that keeps an opinion; any thread may call it.

  The name of an image is made of its content, so it is kept once. The latest
  opinion decides in which folder.

  Args:
    folder: is made if it is missing.
    categories: that are served; each gets a folder of its name.

  Raises:
    OSError: the folder cannot be written to.
    ValueError: a category cannot be the name of a folder.
  """
  folder = os.path.abspath(os.fspath(folder))
  for category in categories:
    if category in ('', '.', '..') or os.path.basename(category) != category:
      raise ValueError(
        f'--feedback: the category {category!r} is no name of a folder'
      )
    os.makedirs(os.path.join(folder, category), exist_ok=True)
  with tempfile.TemporaryFile(dir=folder):
    pass  # It can be written to.
  lock = threading.Lock()

  def keep(
    category: str, opinion: str, content: bytes, fields: Mapping[str, Any]
  ) -> str:
    name = hashlib.sha256(content).hexdigest()[:16] + _suffix(content)
    path = os.path.join(category, 'test', opinion, name)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
    entry = {'time': now, 'file': path, 'opinion': opinion, **fields}
    with lock:
      _write(os.path.join(folder, path), content)
      for other in OPINIONS:
        former = os.path.join(folder, category, 'test', other, name)
        if other != opinion and os.path.exists(former):
          os.unlink(former)
      log = os.path.join(folder, category, _LOG)
      with open(log, 'a', encoding='utf-8') as file:
        file.write(json.dumps(entry) + '\n')
    return path

  return keep


def _suffix(content: bytes) -> str:
  for start, suffix in _SUFFIXES.items():
    if content.startswith(start):
      return suffix
  return '.tif'


def _write(path: str, content: bytes) -> None:
  """Writes a file that appears when it is whole."""
  folder = os.path.dirname(path)
  os.makedirs(folder, exist_ok=True)
  handle, draft = tempfile.mkstemp(dir=folder, prefix='.')
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(content)
    os.chmod(draft, 0o644)
    os.replace(draft, path)
  except BaseException:
    os.unlink(draft)
    raise
