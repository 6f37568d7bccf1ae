"""Reads and checks images and masks, without TensorFlow and jax.

The formats are `files.FORMATS`.

Synopsis:

  train = images.validate(dataset.train, on_bad='skip')
  pictures, masks = images.load_arrays(train, size=256)

A file that cannot be used as an image or a mask raises `files.BadImageError`.
The message names the file, what was found, what was expected and what to do.
"""

from collections.abc import Callable, Iterable, Sequence
import concurrent.futures
import functools
import io
import os

from absl import logging
import numpy as np
from PIL import Image
from PIL import ImageOps

from dmdd_jax.data import files
from dmdd_jax.data import limits
from dmdd_jax.data import records as records_lib

# Safe for uploads; other formats (EPS, for example) start programs.
UPLOAD_FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP')


class ImageTooLargeError(files.BadImageError):
  """An image has more pixels, or another structure, than is allowed."""


def validate(
  records: Iterable[records_lib.Record],
  on_bad: str = 'error',
  num_threads: int = 0,
) -> tuple[records_lib.Record, ...]:
  """Decodes every image and mask in full and returns the usable records.

  A mask must have its image's height and width, both after their EXIF
  orientation. A defect image whose mask is all zero is kept, with a warning.

  Args:
    records: the records to check.
    on_bad: 'error' raises at a bad file; 'skip' drops its record and logs a
      warning with the file, and the count of all dropped records.
    num_threads: threads that decode; 0 for one per processor.

  Returns:
    The records without the dropped ones, in their order.

  Raises:
    BadImageError: with 'error', a file is bad; the message has the first one in
      full and names others. With 'skip', all files are bad.
    ValueError: another on_bad.
  """
  if on_bad not in ('error', 'skip'):
    raise ValueError(
      f"data.on_bad_image: found {on_bad!r}, expected 'error' or 'skip'."
    )
  records = tuple(records)
  faults = map_threads(_fault, records, num_threads)
  bad = [fault for fault in faults if fault]
  if bad and on_bad == 'error':
    more = ''
    if len(bad) > 1:
      more = f' And {len(bad) - 1} more: {files.abbreviate(bad[1:], sep="; ")}.'
    raise files.BadImageError(
      f'{bad[0]}.{more} Replace or remove the file, or leave bad files out '
      'with --config.data.on_bad_image=skip.'
    )
  for fault in bad:
    logging.warning('Skipped: %s.', fault)
  kept = tuple(r for r, fault in zip(records, faults, strict=True) if not fault)
  if bad and not kept:
    raise files.BadImageError(
      f'All {len(records)} images are unusable, the first: {bad[0]}. '
      'Check that --config.data.root is the folder you mean.'
    )
  if bad:
    logging.warning('Skipped %d of %d images.', len(bad), len(records))
  return kept


def _fault(record: records_lib.Record) -> str | None:
  """Returns the fault of a record's files as a text, None for good files."""
  try:
    image = _read(record.image, _to_rgb)
    if record.mask is None:
      return None
    mask = _read_binary(record.mask)
  except files.BadImageError as error:
    return str(error)
  if mask.size != image.size:
    return (
      f'{record.mask}: the mask is {mask.width}x{mask.height} (width x height) '
      f'but its image {record.image} is {image.width}x{image.height}; '
      'expected equal sizes'
    )
  if mask.getbbox() is None:
    logging.warning(
      'The mask %s is all zero though %s lies in a defect folder.',
      record.mask,
      record.image,
    )
  return None


def read_image(path: str | os.PathLike, size: int | None) -> np.ndarray:
  """Reads an image as 8-bit RGB.

  The EXIF orientation is applied. 16-bit greyscale is scaled from its full
  range (0-65535 to 0-255), not stretched. Palette and greyscale become RGB.
  Transparent images are laid over black, because the colour under transparent
  pixels depends on the program that wrote the file. The first of several frames
  is read. An image of another size is resized to the square with an antialiased
  bilinear filter; its aspect ratio is not kept.

  Args:
    path: the file.
    size: height and width of the result; None keeps those of the file.

  Returns:
    uint8 (size, size, 3) in [0, 255].

  Raises:
    BadImageError: the file is missing, no image or truncated, is built to
      take long (see `limits.fault`), or has 32-bit integers or floats, whose
      range is unknown.
  """
  image = np.asarray(_read(path, _to_rgb))
  return image if size is None else resize_image(image, size)


def decode_image(content: bytes, max_pixels: int) -> np.ndarray:
  """Reads an uploaded image, like `read_image`.

  Args:
    content: the bytes of a file in one of `UPLOAD_FORMATS`.
    max_pixels: a larger image is refused by its header, before it is decoded.

  Returns:
    uint8 (H, W, 3) RGB in [0, 255].

  Raises:
    ImageTooLargeError: the image has more pixels, or see `limits.fault`.
    BadImageError: the file has another format or is damaged.
    MemoryError: this process may not use as much as decoding takes.
  """
  try:
    with Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS) as file:
      if file.width * file.height > max_pixels:
        raise ImageTooLargeError(
          f'the image has {file.width} x {file.height} pixels; at most'
          f' {max_pixels} are allowed'
        )
      if fault := limits.fault(file):
        raise ImageTooLargeError(fault)
      return np.asarray(_to_rgb(ImageOps.exif_transpose(file), file.format))
  except (files.BadImageError, MemoryError):
    raise
  except Image.DecompressionBombError as error:
    raise ImageTooLargeError(str(error)) from error
  except Image.UnidentifiedImageError:
    fault = f'is none of {", ".join(UPLOAD_FORMATS)}'
  except Exception as error:  # As in `_read`.
    fault = f'cannot be decoded ({str(error) or type(error).__name__})'
  raise files.BadImageError(f'the image ({len(content)} bytes) {fault}')


def decode_file(
  path: str | os.PathLike, content: bytes | None = None
) -> Image.Image:
  """Reads an image like `read_image`, as a Pillow image of mode RGB.

  Args:
    path: the file.
    content: the bytes of the file, if they are in memory already.

  Raises:
    BadImageError: as for `read_image`.
  """
  return _read(path, _to_rgb, content)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes (H, W, 3) or (H, W) uint8 to RGB (size, size, 3), antialiased."""
  picture = Image.fromarray(image).convert('RGB')
  if picture.size != (size, size):
    picture = picture.resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(picture)


def read_mask(path: str | os.PathLike, size: int | None) -> np.ndarray:
  """Reads a mask; a pixel that is not black is anomalous.

  The EXIF orientation is applied, and transparent pixels count as black. In a
  JPEG only the brighter half of the range is anomalous, because compression
  makes near-black noise around edges. A mask of another size is resized by
  nearest neighbour.

  Args:
    path: the file, or a folder of masks, which are joined.
    size: height and width of the result; None keeps those of the file.

  Returns:
    uint8 (size, size, 1) in {0, 1}.

  Raises:
    BadImageError: as for `read_image`.
  """
  mask = _read_binary(path)
  if size is not None and mask.size != (size, size):
    mask = mask.resize((size, size), Image.Resampling.NEAREST)
  return np.asarray(mask)[..., np.newaxis]


def native_mask(record: records_lib.Record) -> np.ndarray:
  """The mask (H, W) uint8 in {0, 1} at its own size; zeros without one."""
  if record.mask is not None:
    return read_mask(record.mask, None)[..., 0]
  return np.zeros(read_image(record.image, None).shape[:2], np.uint8)


def load_arrays(
  records: Sequence[records_lib.Record], size: int, num_threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Reads all images and masks into memory; see `read_image`, `read_mask`.

  Args:
    records: N records.
    size: height and width.
    num_threads: threads that decode; 0 for one per processor.

  Returns:
    images uint8 (N, size, size, 3) in [0, 255], and masks uint8
    (N, size, size, 1) in {0, 1}, zero where a record has no mask.

  Raises:
    BadImageError: a file cannot be read.
  """
  records = tuple(records)
  images = np.zeros((len(records), size, size, 3), np.uint8)
  masks = np.zeros((len(records), size, size, 1), np.uint8)

  def fill(index: int) -> None:
    images[index] = read_image(records[index].image, size)
    mask = records[index].mask
    if mask is not None:
      masks[index] = read_mask(mask, size)

  map_threads(fill, range(len(records)), num_threads)
  return images, masks


def _read_binary(path: str | os.PathLike) -> Image.Image:
  """Decodes a mask, or all masks of a folder into one."""
  if not os.path.isdir(path):
    return _read(path, _to_binary)
  masks = [_read(name, _to_binary) for name in files.images(os.fspath(path))]
  if not masks or len({mask.size for mask in masks}) > 1:
    fault = 'no mask in this folder'
    if masks:
      fault = 'its masks differ in size'
    raise files.BadImageError(f'{os.fspath(path)}: {fault}')
  union = np.max([np.asarray(mask) for mask in masks], axis=0)
  return Image.fromarray(union)


def _read(
  path: str | os.PathLike,
  convert: Callable[[Image.Image, str | None], Image.Image],
  encoded: bytes | None = None,
) -> Image.Image:
  """Decodes a file in full, upright, converted; all faults as BadImageError.

  With `encoded`, the content of the file, the file itself is not read.
  """
  path = os.fspath(path)
  suffix = os.path.splitext(path)[1].lower()
  if suffix in files.UNREAD:
    raise files.BadImageError(
      f'{path}: {suffix} is not read; convert the image, for example to PNG'
    )
  source = path if encoded is None else io.BytesIO(encoded)
  try:
    with Image.open(source, formats=_formats()) as file:
      if wrong := limits.fault(file):
        raise files.BadImageError(f'{path}: {wrong}')
      # A transposed copy no longer knows its format.
      return convert(ImageOps.exif_transpose(file), file.format)
  except files.BadImageError:
    raise
  except FileNotFoundError:
    fault = 'no such file (or a link to a missing one)'
  except Image.UnidentifiedImageError:
    size = os.path.getsize(path) if encoded is None else len(encoded)
    fault = f'not an image Pillow knows ({size} bytes)'
  # Pillow's decoders raise many types on corrupt bytes: OSError, SyntaxError,
  # struct.error, IndexError, DecompressionBombError...
  except Exception as error:
    fault = f'cannot be decoded ({str(error) or type(error).__name__})'
  raise files.BadImageError(f'{path}: {fault}')


@functools.cache
def _formats() -> tuple[str, ...]:
  """Of `files.FORMATS`, those that this Pillow can read."""
  Image.init()
  return tuple(name for name in files.FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image, source: str | None) -> Image.Image:
  """Returns an 8-bit RGB image, see read_image; source is the file format."""
  if image.mode[0] in 'IF':
    # Some Pillow versions open 16-bit PNG and PPM as 'I'.
    if image.mode in 'IF' and (image.mode, source) not in (
      ('I', 'PNG'),
      ('I', 'PPM'),
    ):
      raise ValueError(
        f'32-bit pixels (Pillow mode {image.mode}); expected 8 or 16 bits'
      )
    values = np.asarray(image).astype(np.int64)
    image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
  elif image.has_transparency_data:
    image = image.convert('RGBA')
    black = Image.new('RGBA', image.size, (0, 0, 0, 255))
    image = Image.alpha_composite(black, image)
  return image.convert('RGB')


def _to_binary(image: Image.Image, source: str | None) -> Image.Image:
  """Returns an 8-bit image in {0, 1}, see read_mask."""
  if image.mode[0] in 'IF':  # Before scaling: 1 of 65535 would become 0.
    values = np.asarray(image) != 0
  else:
    lowest = 128 if source == 'JPEG' else 1
    values = np.asarray(_to_rgb(image, source)).max(axis=-1) >= lowest
  return Image.fromarray(values.astype(np.uint8))


def map_threads(function: Callable, items: Iterable, num_threads: int) -> list:
  """Returns [function(item) ...] in order; Pillow decodes without the GIL."""
  workers = num_threads or os.cpu_count() or 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    try:
      return list(pool.map(function, items))
    except BaseException:  # Ctrl-C, or an error, does not wait for the rest.
      pool.shutdown(wait=False, cancel_futures=True)
      raise
