"""The files of a run's folder, local or of a file system that epath knows.

Names are texts, 'runs/demo' or 'gs://bucket/run', and are joined by
`os.path.join`. What is written is never seen half written: a local file is
moved to its place, and others appear when they are closed.

Experimental: gs:// was run with a local folder in place of the bucket, never
with a real bucket.

Synopsis:

  storage.write_text('gs://bucket/run/results.md', table)
  with storage.writing('runs/demo/batch.npz') as file:
    np.savez(file, **batch)
  if storage.path('runs/demo/results.json').exists():
    ...
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import hashlib
import os
import shutil
import tempfile
from typing import Any, IO

from absl import logging
from etils import epath

_DRAFT = '.draft-'  # How the name of a file begins that is being written.


def is_remote(name: str | os.PathLike) -> bool:
  """Whether a name is of another file system, 'gs://...'."""
  return '://' in os.fspath(name)


def absolute(name: str | os.PathLike) -> str:
  """A name that does not depend on the working directory."""
  name = os.fspath(name)
  return name if is_remote(name) else os.path.abspath(name)


def path(name: str | os.PathLike) -> epath.Path:
  """A path with `exists`, `glob`, `read_text` and the like."""
  return epath.Path(absolute(name))


def folders(name: str | os.PathLike, inside: str) -> list[str]:
  """The folders NAME/* that hold `inside`, by name."""
  if not path(name).is_dir():
    return []
  paths = [
    os.path.join(os.fspath(name), child.name)
    for child in path(name).iterdir()
    if (child / inside).exists()
  ]
  return sorted(paths)


@contextlib.contextmanager
def writing(name: str | os.PathLike) -> Iterator[IO[bytes]]:
  """A file to write bytes to; its folder is made, and it appears at the end.

  Left by an exception, what was there before is still there.

  Raises:
    OSError: the system refuses; the message names the file.
  """
  target = path(name)
  with _naming(name):
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = None if is_remote(name) else target.parent
    # Not of the target's name: with more letters it could be too long.
    handle, draft = tempfile.mkstemp(dir=folder, prefix=_DRAFT)
    try:
      with os.fdopen(handle, 'wb') as file:
        yield file
      if is_remote(name):
        with open(draft, 'rb') as source, target.open('wb') as copy:
          shutil.copyfileobj(source, copy)
        os.unlink(draft)
      else:
        os.chmod(draft, 0o644)
        os.replace(draft, target)
    except BaseException:
      os.unlink(draft)
      raise


@contextlib.contextmanager
def _naming(name: str | os.PathLike) -> Iterator[None]:
  """Gives an error without a file name, as that of a full disk, this name."""
  try:
    yield
  except OSError as error:
    if error.errno is None:
      raise OSError(f'{os.fspath(name)}: {error}') from error
    named = os.path.basename(os.fspath(error.filename or _DRAFT))
    if not named.startswith(_DRAFT):
      raise
    raise OSError(error.errno, error.strerror, os.fspath(name)) from error


def attempt(
  failures: dict[str, str],
  name: str,
  write: Callable[..., object],
  /,
  *arguments: Any,
  **options: Any,
) -> None:
  """Writes what the scores can do without: a failure is logged and noted.

  Args:
    failures: gets {name: reason}.
    name: of the file, or of what it is.
    write: called with the rest; may raise any exception.
    *arguments: of `write`.
    **options: of `write`.
  """
  try:
    write(*arguments, **options)
  except Exception as error:
    failures[name] = str(error) or type(error).__name__
    # A traceback tells more of a bug, and nothing more of a full disk.
    bug = not isinstance(error, OSError)
    logging.error('%s was not written: %s', name, error, exc_info=bug)


def fit_name(name: str, suffix: str) -> str:
  """A file's name with a suffix added, shortened if a disk cannot hold it.

  The name of a file has at most 255 bytes. A longer one is cut, and a hash of
  the whole name keeps it apart from others. Folders in `name` stay.
  """
  folder, last = os.path.split(name)
  limit, encoded = 255 - len(os.fsencode(suffix)), os.fsencode(last)
  if len(encoded) <= limit:
    return name + suffix
  digest = hashlib.blake2b(encoded, digest_size=6).hexdigest()
  # Bytes of a character that is cut through are left out.
  start = encoded[: limit - len(digest) - 1].decode('utf-8', 'ignore')
  return os.path.join(folder, f'{start}~{digest}{suffix}')


def write_text(name: str | os.PathLike, text: str) -> None:
  """Writes a text file in UTF-8, its line ends and names' bytes as they are."""
  with writing(name) as file:
    file.write(text.encode('utf-8', 'surrogateescape'))


def append_text(name: str | os.PathLike, text: str) -> None:
  """Adds text to the end of a file; the file and its folder are made.

  Object stores cannot append: a remote file is read and written as a whole.
  """
  if is_remote(name):
    before = path(name).read_bytes() if path(name).exists() else b''
    write_text(name, before.decode('utf-8', 'surrogateescape') + text)
    return
  with _naming(name):
    path(name).parent.mkdir(parents=True, exist_ok=True)
    with open(name, 'ab') as file:
      file.write(text.encode('utf-8', 'surrogateescape'))


def write_texts(folder: str | os.PathLike, texts: Mapping[str, str]) -> None:
  """Writes text files, {name: text}, into a folder, which is made."""
  for name, text in texts.items():
    write_text(os.path.join(folder, name), text)
