"""Lists files and folders of images; the errors that name them.

Hidden files and files without an image suffix are never listed; links are
followed. Every list is sorted.
"""

import collections
from collections.abc import Sequence
import hashlib
import os
import re

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
_NAMED = 5  # File names in one message.
# Control characters, and bytes of a name that are not UTF-8 (surrogates).
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')


class MissingDataError(FileNotFoundError):
  """A folder or file that the layout needs is not there."""


class DatasetError(ValueError):
  """A folder is there but does not hold a usable data set."""


class BadImageError(ValueError):
  """A file cannot be used as an image, or as the mask of its image."""


def absolute(path: str | os.PathLike) -> str:
  """The absolute path, with ~ expanded."""
  return os.path.abspath(os.path.expanduser(os.fspath(path)))


def stem(path: str) -> str:
  """The file name without folder and suffix."""
  return os.path.splitext(os.path.basename(path))[0]


def printable(name: str | os.PathLike) -> str:
  """A name as pictures, pages and logs can show it, in valid UTF-8.

  A byte that is not UTF-8, or a control character, becomes U+FFFD. Tables keep
  the name itself: they are written with 'surrogateescape'.
  """
  return _UNPRINTABLE.sub('\ufffd', os.fspath(name))


def is_image(path: str) -> bool:
  """Whether a name has an image suffix, in any case, and is not hidden."""
  name = os.path.basename(path)
  return name[:1] != '.' and os.path.splitext(name)[1].lower() in SUFFIXES


def folders(folder: str) -> tuple[str, ...]:
  """The names of the folders in a folder."""
  return tuple(entry.name for entry in _entries(folder) if entry.is_dir())


def images(folder: str) -> tuple[str, ...]:
  """The paths of the image files in a folder.

  A broken link is listed too: dropping it would hide it from `validate`.
  """
  return tuple(
    entry.path
    for entry in _entries(folder)
    if is_image(entry.name) and not entry.is_dir()
  )


def others(folder: str) -> tuple[str, ...]:
  """The paths of the files in a folder whose names are not those of images."""
  return tuple(
    entry.path
    for entry in _entries(folder)
    if not is_image(entry.name) and not entry.is_dir()
  )


def images_below(folder: str) -> tuple[str, ...]:
  """The paths of the image files in a folder and in all folders below it."""
  paths: list[str] = []
  seen, pending = set(), collections.deque([folder])
  while pending:
    folder = pending.popleft()
    if os.path.realpath(folder) in seen:  # Links may form a loop.
      continue
    seen.add(os.path.realpath(folder))
    paths += images(folder)
    pending += [os.path.join(folder, name) for name in folders(folder)]
  return tuple(sorted(paths))


def by_stem(folder: str) -> dict[str, str]:
  """The image files of a folder by stem; {} when it is missing."""
  if not os.path.isdir(folder):
    return {}
  return {stem(path): path for path in reversed(images(folder))}


def draw(path: str, seed: int) -> bytes:
  """A hash (16 bytes) of file name and seed, to draw files in its order."""
  text = f'{seed}/{os.path.basename(path)}'
  return hashlib.blake2b(
    text.encode('utf-8', 'surrogateescape'), digest_size=16
  ).digest()


def abbreviate(names: Sequence[str], sep: str = ', ') -> str:
  """The first five names, and an ellipsis if there are more; for messages."""
  return sep.join(names[:_NAMED]) + (sep + '...' if len(names) > _NAMED else '')


def _entries(folder: str) -> list[os.DirEntry]:
  """The entries of a folder that are not hidden, sorted by name."""
  try:
    with os.scandir(folder) as entries:
      return sorted(
        (entry for entry in entries if not entry.name.startswith('.')),
        key=lambda entry: entry.name,
      )
  except OSError as error:
    raise DatasetError(
      f'Folder {folder}: cannot be read ({error.strerror}), expected a folder '
      'that can be listed. Check its permissions.'
    ) from None
