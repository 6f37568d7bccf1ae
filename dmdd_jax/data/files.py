"""Which files are looked at, their names, and the errors that name them.

One rule for all programs. A file is an image if its suffix is one of `SUFFIXES`
or `UNREAD`, in any case. Where the suffix says nothing, its first bytes decide.
Hidden files and folders are not looked at, nor what a run writes. Links are
followed, and no folder is searched twice. A link to a missing file is an image
that cannot be read. Every list is sorted.

Synopsis:

  listing = files.list_inputs('new/', output='out')
  for path in listing.images: ...
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import glob
import hashlib
import os
import re
import stat

from absl import logging

# The formats of Pillow that are read, and their suffixes. Others start programs
# (EPS), or are guessed (camera raw is taken for TIFF, and a preview is read).
# fmt: off
FORMATS = (
  'PNG', 'JPEG', 'MPO', 'BMP', 'DIB', 'TIFF', 'WEBP', 'GIF', 'PPM', 'JPEG2000',
  'AVIF', 'TGA',
)
SUFFIXES = (
  '.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.apng', '.jpe',
  '.jfif', '.mpo', '.dib', '.gif', '.avif', '.tga', '.ppm', '.pgm', '.pbm',
  '.pnm', '.jp2', '.j2k', '.jpx', '.jpf',
)
# Images that are listed, and refused when they are read.
UNREAD = (
  '.heic', '.heif', '.jxl', '.psd', '.exr', '.dcm', '.raw', '.dng', '.cr2',
  '.cr3', '.nef', '.arw', '.raf', '.orf', '.rw2', '.pef', '.srw', '.nrw',
  '.heics', '.hif', '.psb', '.xcf', '.eps', '.pcx', '.sgi', '.pfm', '.pam',
  '.dds', '.jls', '.jxr', '.qoi', '.fits', '.fit', '.dicom', '.ima',
)
# Suffixes that say that a file is no image: its content is not looked at.
_NO_IMAGES = (
  '.txt', '.csv', '.json', '.xml', '.md', '.yaml', '.yml', '.html', '.log',
  '.ini', '.db', '.npy', '.npz', '.zip', '.pdf', '.py',
)
# fmt: on
_CONTENT = re.compile(
  rb'\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|II[*+]\0|MM\0[*+]'
  rb'|RIFF.{4}WEBP|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0'
  rb'|P[1-6]\s+(#[^\n]*\n\s*)*\d+\s|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51'
  rb'|.{4}ftyp(avi[fs]|hei[cfsx]|hev[cx]|mif1|msf1)|8BPS|v/1\x01'
  rb'|\0\0\0\x0cJXL \r\n\x87\n|.{128}DICM|P7\nWIDTH |qoif|SIMPLE  =',
  re.DOTALL,
)
_HEAD = 256  # Bytes that are read of a file to know its content.
# What runs write: folders, each by the file that lies beside it.
_OF_INSPECTION = 'predictions.json'
_WRITTEN = {
  'maps': _OF_INSPECTION,
  'overlays': _OF_INSPECTION,
  'pictures': 'report_data.zip',
}
_NAMED = 5  # File names in one message.
# Control characters, and bytes of a name that are not UTF-8 (surrogates).
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')


class MissingDataError(FileNotFoundError):
  """A folder or file that the layout needs is not there."""


class DatasetError(ValueError):
  """A folder is there but does not hold a usable data set."""


class BadImageError(ValueError):
  """A file cannot be used as an image, or as the mask of its image."""


@dataclasses.dataclass(frozen=True)
class Listing:
  """What lies in folders.

  Attributes:
    images: paths of the images; one that cannot be read is among them.
    others: paths of what is not looked at: files that are no images, and
      hidden files and folders.
    written: paths of files and folders that a run wrote, not looked at either.
    faults: {path of a folder: why it cannot be listed}.
  """

  images: tuple[str, ...]
  others: tuple[str, ...]
  written: tuple[str, ...]
  faults: dict[str, str]

  def skipped(self) -> str:
    """What is not looked at, counted and named; '' where that is nothing."""
    parts = {
      'no images or hidden': self.others,
      'written by a run': self.written,
      'folders that cannot be listed': tuple(self.faults),
    }
    return '; '.join(
      f'{len(paths)} {what} ({abbreviate(paths)})'
      for what, paths in parts.items()
      if paths
    )


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
  """Whether a file is an image, by its suffix or its first bytes.

  What cannot be opened, such as a link to a missing file, counts as one, so
  that whoever reads it names it. A folder, pipe, socket or device is none.
  """
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      return False
  except OSError:
    pass
  return _says_image(path)


def _says_image(path: str) -> bool:
  """`is_image` of what is known to be no folder, pipe or the like."""
  suffix = os.path.splitext(path)[1].lower()
  if suffix in SUFFIXES + UNREAD:
    return True
  if suffix in _NO_IMAGES:
    return False
  try:
    with open(path, 'rb') as file:
      return _CONTENT.match(file.read(_HEAD)) is not None
  except OSError:
    return True


def folders(folder: str) -> tuple[str, ...]:
  """The names of the folders in a folder."""
  return tuple(entry.name for entry in _entries(folder) if _is_folder(entry))


def images(folder: str) -> tuple[str, ...]:
  """The paths of the image files in a folder.

  A broken link is listed too: dropping it would hide it from `validate`. The
  log says what else is there.
  """
  if skipped := others(folder):
    logging.warning(
      '%s: %d files are no images: %s',
      printable(folder),
      len(skipped),
      abbreviate(skipped),
    )
  return _images(folder)


def others(folder: str) -> tuple[str, ...]:
  """The paths of the files in a folder that are no images."""
  entries = _entries(folder)
  return tuple(
    e.path for e in entries if not _is_folder(e) and not _is_image(e)
  )


def images_below(folder: str) -> tuple[str, ...]:
  """The paths of the image files in a folder and in all folders below it.

  The log says what else is there.

  Raises:
    DatasetError: a folder cannot be listed.
  """
  listing = look([folder])
  for fault in listing.faults.values():
    raise DatasetError(fault)
  if skipped := listing.skipped():
    logging.warning('%s: not looked at: %s', printable(folder), skipped)
  return listing.images


def list_inputs(
  pattern: str | os.PathLike,
  output: str | os.PathLike | None = None,
  field: str = '--input',
) -> Listing:
  """Lists what a user names; the log says what is not looked at.

  Args:
    pattern: a file; a folder, which is searched with all below it; a list, a
      file whose suffix is .txt, with the path of a file or folder on each line,
      relative to the list; or a glob of files and folders. What is there goes
      before a glob of the same characters. ~ is expanded.
    output: where the program writes; it is not looked at.
    field: the name of the flag or field, for errors.

  Raises:
    MissingDataError: there is no image.
    DatasetError: none of the folders can be listed.
  """
  listing = look_for(pattern, output)
  skipped = listing.skipped()
  if not listing.images:
    for fault in listing.faults.values():
      raise DatasetError(fault)
    raise MissingDataError(
      f'{field}={os.fspath(pattern)}: holds no image (in'
      f' {os.getcwd()}; not looked at: {skipped or "nothing"}). Name a file, a'
      ' folder, a glob in quotes, or a list of paths, LIST.txt. Formats:'
      f' {", ".join(FORMATS)}'
    )
  if skipped:
    logging.warning('%s: not looked at: %s', field, skipped)
  return listing


def look_for(
  pattern: str | os.PathLike, output: str | os.PathLike | None = None
) -> Listing:
  """Like `list_inputs`, but logs nothing, and there may be no image."""
  name = os.path.expanduser(os.fspath(pattern))
  if os.path.isdir(name):
    return look([name], output)
  if os.path.lexists(name):
    is_list = os.path.splitext(name)[1].lower() == '.txt'
    paths = read_list(name) if is_list else [name]
    return look(paths, output, as_images=True)
  # By its own name, rather than that of a link to its folder.
  paths = sorted(
    _matches(name), key=lambda p: (os.path.isdir(p), os.path.islink(p), p)
  )
  listing = look(paths, output)
  return dataclasses.replace(listing, images=tuple(sorted(listing.images)))


def read_list(path: str) -> list[str]:
  """The paths in a text file, one a line, relative to the file's folder."""
  with open(path, 'rb') as file:
    content = file.read().removeprefix(b'\xef\xbb\xbf')
  lines = [os.fsdecode(line.rstrip(b'\r')) for line in content.split(b'\n')]
  folder = os.path.dirname(path)
  return [
    os.path.join(folder, os.path.expanduser(line))
    for line in lines
    if line.strip()
  ]


def look(
  paths: Iterable[str],
  output: str | os.PathLike | None = None,
  as_images: bool = False,
) -> Listing:
  """Lists files and folders, these with all below them, in their order.

  Args:
    paths: a file that comes twice, by itself or in a folder, is listed once.
    output: a folder that is not looked at, unless a path lies in it. What
      programs write into it is never looked at.
    as_images: take every file for an image; else `is_image` decides.
  """
  target = os.path.realpath(output) if output else ''
  real = functools.cache(os.path.realpath)
  images: dict[tuple[str, str], str] = {}
  others: list[str] = []
  written: list[str] = []
  faults: dict[str, str] = {}
  for path in paths:
    if _is_written(path, target):
      written.append(path)
      continue
    names = [path]
    if os.path.isdir(path):
      names = []
      for _, inside, rest in _walk(path, target, written, faults):
        names += inside
        others += rest
      names.sort()
    elif not as_images and not is_image(path):
      names, others = [], [*others, path]
    for name in names:
      folder, base = os.path.split(name)
      images.setdefault((real(folder), base), name)
  others.sort()
  return Listing(tuple(images.values()), tuple(others), tuple(written), faults)


def by_stem(folder: str) -> dict[str, str]:
  """The image files of a folder by stem; {} when it is missing."""
  if not os.path.isdir(folder):
    return {}
  return {stem(path): path for path in reversed(_images(folder))}


def draw(path: str, seed: int) -> bytes:
  """A hash (16 bytes) of file name and seed, to draw files in its order."""
  text = f'{seed}/{os.path.basename(path)}'
  return hashlib.blake2b(
    text.encode('utf-8', 'surrogateescape'), digest_size=16
  ).digest()


def abbreviate(names: Sequence[str], sep: str = ', ') -> str:
  """The first five names, and an ellipsis if there are more; for messages."""
  shown = sep.join(printable(name) for name in names[:_NAMED])
  return shown + (sep + '...' if len(names) > _NAMED else '')


def _walk(
  root: str, target: str, written: list[str], faults: dict[str, str]
) -> Iterator[tuple[str, list[str], list[str]]]:
  """Searches a folder and all below it; links may form a loop.

  Args:
    root: the folder.
    target: what programs write to now, '' or a path without links.
    written: gets what programs wrote.
    faults: gets the folders that cannot be listed.

  Yields:
    Each folder once, with its images, and what is not looked at in it.
  """
  seen: set[str] = set()
  # A folder is listed under its own name rather than that of a link to it.
  pending, links = collections.deque([root]), collections.deque[str]()
  while pending or links:
    folder = (pending or links).popleft()
    real = os.path.realpath(folder)
    if real in seen:
      continue
    seen.add(real)
    try:
      entries = _entries(folder, hidden=True)
    except DatasetError as error:
      faults[folder] = str(error)
      continue
    inside: list[str] = []
    rest: list[str] = []
    for entry in entries:
      path = entry.path
      if entry.name.startswith('.'):
        rest.append(path)
      elif not _is_folder(entry):
        (inside if _is_image(entry) else rest).append(path)
      elif os.path.realpath(path) == target or _is_written(path, target):
        written.append(path)
      else:
        (links if entry.is_symlink() else pending).append(path)
    yield folder, inside, rest


def _is_written(path: str, target: str) -> bool:
  """Whether a path is, or lies in, a folder that programs write."""
  folder, name = os.path.split(path)
  folder = os.path.realpath(folder)
  while True:
    beside = _WRITTEN.get(name)
    # Only an inspection has an output, and may not have its table yet.
    if (beside == _OF_INSPECTION and folder == target) or (
      beside and os.path.exists(os.path.join(folder, beside))
    ):
      return True
    if os.path.dirname(folder) == folder:
      return False
    folder, name = os.path.split(folder)


def _matches(pattern: str) -> list[str]:
  """What a glob matches; ** goes into every folder once, links or not."""
  parts = pattern.split(os.sep)
  if '**' not in parts:
    return glob.glob(pattern)
  at = parts.index('**')
  heads = [os.sep] if pattern.startswith(os.sep) else [os.curdir]
  if head := os.sep.join(parts[:at]):
    heads = [path for path in glob.glob(head) if os.path.isdir(path)]
  rest = parts[at + 1 :]
  if not any(rest):
    return heads
  matches = []
  for head in heads:
    for folder, _, _ in _walk(head, '', [], {}):
      matches += _matches(os.path.join(glob.escape(folder), *rest))
  return [path.removeprefix(os.path.join(os.curdir, '')) for path in matches]


def _images(folder: str) -> tuple[str, ...]:
  """The paths of the image files in a folder."""
  entries = _entries(folder)
  return tuple(e.path for e in entries if not _is_folder(e) and _is_image(e))


def _is_image(entry: os.DirEntry) -> bool:
  """`is_image` of an entry; asks the disk of links and rare suffixes alone."""
  if entry.is_file(follow_symlinks=False):
    return _says_image(entry.path)
  return is_image(entry.path)


def _is_folder(entry: os.DirEntry) -> bool:
  """Whether an entry is a folder; a link to itself is none."""
  if entry.is_symlink():
    return os.path.isdir(entry.path)
  return entry.is_dir()


def _entries(folder: str, hidden: bool = False) -> list[os.DirEntry]:
  """The entries of a folder, sorted by name; hidden ones where asked for."""
  try:
    with os.scandir(folder) as entries:
      return sorted(
        (e for e in entries if hidden or not e.name.startswith('.')),
        key=lambda entry: entry.name,
      )
  except OSError as error:
    raise DatasetError(
      f'Folder {folder}: cannot be read ({error.strerror}), expected a folder '
      'that can be listed. Check its permissions.'
    ) from None
