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

from collections.abc import Iterator, Mapping
import contextlib
import os
import shutil
import tempfile
from typing import IO

from etils import epath


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

  Left by an exception, what was there before is still there. A system error
  names the file.
  """
  target = path(name)
  target.parent.mkdir(parents=True, exist_ok=True)
  folder = None if is_remote(name) else os.fspath(target.parent)
  with _naming(name):
    # Not by the target's name, which may have all the bytes that a name can.
    handle, draft = tempfile.mkstemp(dir=folder, prefix='.draft.')
  with _naming(name, draft):
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
def _naming(
  name: str | os.PathLike, draft: str | None = None
) -> Iterator[None]:
  """Puts the file's name into a system error without one, or with a draft's."""
  try:
    yield
  except OSError as error:
    nameless = error.filename is None or draft in (None, error.filename)
    if error.errno is not None and nameless:
      error.filename = os.fspath(name)
      del error.filename2
    raise


def write_text(name: str | os.PathLike, text: str) -> None:
  """Writes a text file in UTF-8, its line ends as they are.

  File names that are not UTF-8 keep their bytes ('surrogateescape').
  """
  with writing(name) as file:
    file.write(text.encode('utf-8', 'surrogateescape'))


def append_text(name: str | os.PathLike, text: str) -> None:
  """Adds text to the end of a file; the file and its folder are made.

  Object stores cannot append: a remote file is read and written as a whole.
  """
  if is_remote(name):
    before = path(name).read_bytes() if path(name).exists() else b''
    write_text(name, before.decode() + text)
    return
  path(name).parent.mkdir(parents=True, exist_ok=True)
  with _naming(name), open(name, 'ab') as file:
    file.write(text.encode())


def write_texts(folder: str | os.PathLike, texts: Mapping[str, str]) -> None:
  """Writes text files, {name: text}, into a folder, which is made."""
  for name, text in texts.items():
    write_text(os.path.join(folder, name), text)
