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
import dataclasses
import functools
import io
import os
from typing import TypeVar

from absl import logging
import numpy as np
from PIL import ExifTags
from PIL import Image
from PIL import ImageOps

from dmdd_jax.data import files
from dmdd_jax.data import limits
from dmdd_jax.data import records as records_lib

# Safe for uploads; other formats (EPS, for example) start programs.
UPLOAD_FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP')


# Pixels an image may have by default: Pillow refuses larger ones.
MAX_PIXELS = 178_956_970
_allowed = MAX_PIXELS
_T = TypeVar('_T')
_WAY_OUT = (
  '. To read it, raise config.data.max_pixels; a pixel takes 3 bytes of memory,'
  ' several times over. Or cut the image into several files. Small defects of a'
  ' large image show only with tiles: config.data.tile_size'
)
# Highest values of cameras with 10, 12 and 14 bits, whose files have 16.
_NARROW = (1023, 4095, 16383)
_SIGNED_16 = 'signed 16-bit TIFF'  # For Pillow, these are of 32 bits.
_COLOUR_16 = '16-bit colour'  # Of which Pillow gives the upper 8 bits.
# A mask with as many values above 0 has soft edges, and no numbered kinds.
_SOFT_LEVELS = 9
# An inverted mask covers more than this of its image, and of the image's edge.
_INVERTED_SHARE, _INVERTED_EDGE = 0.5, 0.9


class ImageTooLargeError(files.BadImageError):
  """An image has more pixels, or another structure, than is allowed."""


def allow_pixels(count: int) -> None:
  """Lets images of this process have as many pixels; it never allows fewer."""
  global _allowed
  _allowed = max(_allowed, count)


def check_size(width: int, height: int, max_pixels: int | None = None) -> None:
  """Refuses an image by its size, before it is decoded.

  Args:
    width: of the image.
    height: of the image.
    max_pixels: the limit, by default the one of `allow_pixels`.

  Raises:
    ImageTooLargeError: it has more pixels.
  """
  limit = _allowed if max_pixels is None else max_pixels
  if width * height <= limit:
    return
  message = (
    f'the image has {width} x {height} pixels; at most {limit} are allowed'
  )
  raise ImageTooLargeError(message + ('' if max_pixels else _WAY_OUT))


def _open(
  source: str | io.BytesIO, formats: tuple[str, ...], max_pixels: int | None
) -> Image.Image:
  """`PIL.Image.open` with the limit of `check_size` in place of Pillow's."""
  limit = _allowed if max_pixels is None else max_pixels
  own = Image.MAX_IMAGE_PIXELS
  if own is not None and limit > 2 * own:
    Image.MAX_IMAGE_PIXELS = limit  # It is the process's; it has no argument.
  try:
    file = Image.open(source, formats=formats)
  except Image.DecompressionBombError as error:
    way_out = '' if max_pixels else _WAY_OUT
    raise ImageTooLargeError(
      f'the image has more than {limit} pixels ({error}){way_out}'
    ) from error
  try:
    check_size(file.width, file.height, max_pixels)
    if fault := limits.fault(file):
      raise ImageTooLargeError(fault)
  except ImageTooLargeError:
    file.close()
    raise
  return file


@dataclasses.dataclass(frozen=True)
class _Look:
  """The fault and the warnings of a record's files.

  Attributes:
    fault: why they cannot be used; '' if they can.
    peak: see `peak`.
    mask: what is doubtful about the mask, see `mask_doubts`.
  """

  fault: str = ''
  peak: tuple[int, int] = (0, 0)
  mask: tuple[str, ...] = ()


def validate(
  records: Iterable[records_lib.Record],
  on_bad: str = 'error',
  num_threads: int = 0,
  white_level: int = 0,
) -> tuple[records_lib.Record, ...]:
  """Decodes every image and mask in full and returns the usable records.

  A mask must have its image's height and width, both after their EXIF
  orientation. Warnings name doubtful masks, and 16-bit images whose values do
  not fit `white_level`; they are kept.

  Args:
    records: the records to check.
    on_bad: 'error' raises at a bad file; 'skip' drops its record and logs a
      warning with the file, and the count of all dropped records.
    num_threads: threads that decode; 0 for one per processor.
    white_level: see `read_image`.

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
  looks = map_threads(_look, records, num_threads)
  faults = [look.fault for look in looks]
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
  doubts = [doubt for look in looks for doubt in look.mask]
  if doubts:
    logging.warning(
      '%d masks are doubtful: %s', len(doubts), files.abbreviate(doubts, '; ')
    )
  if text := white_level_doubt([look.peak for look in looks], white_level):
    logging.warning('%s', text)
  return kept


def white_level_doubt(
  peaks: Iterable[tuple[int, int]], white_level: int
) -> str | None:
  """What to say of 16-bit images with these highest values; None if nothing.

  Args:
    peaks: of each image, see `peak`.
    white_level: see `read_image`.
  """
  peaks = tuple(peaks)
  doubts = (
    _grey_doubt([grey for grey, _ in peaks if grey], white_level),
    _colour_doubt([colour for _, colour in peaks if colour]),
  )
  return '; '.join(filter(None, doubts)) or None


def _colour_doubt(peaks: Sequence[int]) -> str | None:
  for level in _NARROW:
    if peaks and max(peaks) <= level:
      return (
        f'{len(peaks)} colour images have 16 bits and no value above {level},'
        ' so they are read as nearly black, and data.white_level is of'
        f' greyscale alone. Convert them to 8 bits, so that {level} becomes 255'
      )
  return None


def _grey_doubt(peaks: Sequence[int], white_level: int) -> str | None:
  if not peaks:
    return None
  if white_level:
    above = sum(peak > white_level for peak in peaks)
    return (
      above
      and (
        f'{above} of {len(peaks)} 16-bit images have values above'
        f' data.white_level = {white_level}, the highest {max(peaks)}: they are'
        ' cut off'
      )
      or None
    )
  for level in _NARROW:
    if max(peaks) <= level:
      return (
        f'{len(peaks)} images have 16 bits and no value above {max(peaks)}, so'
        ' they are read as nearly black. If the camera has'
        f' {level.bit_length()} bits, set --config.data.white_level={level}'
      )
  return None


def mask_doubts(path: str | os.PathLike) -> tuple[str, ...]:
  """What is doubtful about a readable mask: it is empty, soft, or inverted.

  Args:
    path: the file, or a folder of masks.

  Returns:
    Texts that name the file; () for most.
  """
  doubts = []
  mask = np.asarray(_read_binary(path))
  if not mask.any():
    doubts.append(f'{path} is all zero though it is of a defect')
  edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
  if mask.mean() > _INVERTED_SHARE and edge.mean() > _INVERTED_EDGE:
    doubts.append(
      f'{path} covers {mask.mean():.0%} of its image and nearly all of its'
      ' edge: it may be inverted, as white is the defect'
    )
  if not os.path.isdir(path):
    counts = _read(path, _levels)
    levels = np.flatnonzero(counts)
    if len(levels) >= _SOFT_LEVELS:
      half = counts[(levels[-1] + 1) // 2 :].sum()
      doubts.append(
        f'{path} has soft edges: {counts.sum()} pixels are not black, and all'
        f' count as defective; {half} are at least half as bright as the'
        ' brightest. Masks of two values have no such doubt'
      )
  return tuple(doubts)


def _levels(image: Image.Image, source: str | None) -> np.ndarray:
  """(256,), how many pixels of a mask have each value; 0 for black."""
  if source == 'JPEG' or image.mode[0] in 'IF':
    return np.zeros(256, int)
  values = np.asarray(_to_rgb(image, source)).max(axis=-1)
  counts = np.bincount(values.ravel(), minlength=256)
  counts[0] = 0
  return counts


def peak(path: str | os.PathLike) -> tuple[int, int]:
  """The highest value of a 16-bit image: (greyscale, colour); 0 of any other.

  That of colour is the highest that the upper 8 bits leave possible.

  Raises:
    BadImageError: as for `read_image`.
  """
  return _read(path, _peak)


def _peak(image: Image.Image, source: str | None) -> tuple[int, int]:
  if source == _COLOUR_16:
    upper = int(np.asarray(image.convert('RGB')).max(initial=0))
    return 0, 256 * upper + 255
  if image.mode[0] != 'I':
    return 0, 0
  return int(np.asarray(image).max(initial=0)), 0


def _look(record: records_lib.Record) -> _Look:
  """Reads a record's files in full."""
  try:
    image, highest = _read(
      record.image, lambda *file: (_to_rgb(*file), _peak(*file))
    )
    if record.mask is None:
      return _Look(peak=highest)
    mask = _read_binary(record.mask)
    if mask.size == image.size:
      doubts = mask_doubts(record.mask) if record.label else ()
      return _Look(peak=highest, mask=doubts)
  except files.BadImageError as error:
    return _Look(str(error))
  return _Look(
    f'{record.mask}: the mask is {mask.width}x{mask.height} (width x height) '
    f'but its image {record.image} is {image.width}x{image.height}; '
    'expected equal sizes'
  )


def read_image(
  path: str | os.PathLike, size: int | None, white_level: int = 0
) -> np.ndarray:
  """Reads an image as 8-bit RGB.

  The EXIF orientation is applied. 16-bit greyscale is scaled from its full
  range (0-65535 to 0-255; 0-32767 where it is signed), not stretched. Palette
  and greyscale become RGB. Transparent images are laid over black, because the
  colour under transparent pixels depends on the program that wrote the file.
  The first of several frames
  is read. An image of another size is resized to the square with an antialiased
  bilinear filter; its aspect ratio is not kept.

  Args:
    path: the file.
    size: height and width of the result; None keeps those of the file.
    white_level: of 16-bit greyscale, the value that is white, as 4095 is of 12
      bits; what is above it is white too. 0 is the full range.

  Returns:
    uint8 (size, size, 3) in [0, 255].

  Raises:
    ImageTooLargeError: it has more pixels than `allow_pixels` allows, or is
      built to take long (see `limits.fault`).
    BadImageError: the file is missing, no image or truncated, or has 32-bit
      integers or floats, whose range is unknown, or values below 0.
  """
  convert = functools.partial(_to_rgb, white_level=white_level)
  image = np.asarray(_read(path, convert))
  return image if size is None else resize_image(image, size)


def decode_image(
  content: bytes, max_pixels: int, white_level: int = 0
) -> np.ndarray:
  """Reads an uploaded image, like `read_image`.

  Args:
    content: the bytes of a file in one of `UPLOAD_FORMATS`.
    max_pixels: a larger image is refused by its header, before it is decoded.
    white_level: see `read_image`.

  Returns:
    uint8 (H, W, 3) RGB in [0, 255].

  Raises:
    ImageTooLargeError: the image has more pixels, or see `limits.fault`.
    BadImageError: the file has another format or is damaged.
    MemoryError: this process may not use as much as decoding takes.
  """
  try:
    with _open(io.BytesIO(content), UPLOAD_FORMATS, max_pixels) as file:
      source = _source(file)
      upright = ImageOps.exif_transpose(file)
      return np.asarray(_to_rgb(upright, source, white_level))
  except (files.BadImageError, MemoryError):
    raise
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


def check_array(image: np.ndarray) -> None:
  """Raises BadImageError unless an array is uint8 (H, W, 3) or (H, W)."""
  channels = image.shape[2:]
  if image.dtype != np.uint8 or image.ndim < 2 or channels not in ((), (3,)):
    raise files.BadImageError(
      'an image array must be uint8 (H, W, 3) or (H, W), is'
      f' {image.dtype} {image.shape}'
    )


def native_mask(record: records_lib.Record) -> np.ndarray:
  """The mask (H, W) uint8 in {0, 1} at its own size; zeros without one."""
  if record.mask is not None:
    return read_mask(record.mask, None)[..., 0]
  return np.zeros(native_size(record.image), np.uint8)


def native_size(path: str | os.PathLike) -> tuple[int, int]:
  """Height and width of an upright image, from its header alone.

  Raises:
    BadImageError: the file is missing or no image.
  """

  def measure(file: Image.Image) -> tuple[int, int]:
    # Whether a turned image's header has its upright size depends on the format
    # and on Pillow's version.
    if file.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
      file = ImageOps.exif_transpose(file)
    return file.height, file.width

  return _use_opened(path, measure)


def load_arrays(
  records: Sequence[records_lib.Record],
  size: int,
  num_threads: int = 0,
  white_level: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Reads all images and masks into memory; see `read_image`, `read_mask`.

  Args:
    records: N records.
    size: height and width.
    num_threads: threads that decode; 0 for one per processor.
    white_level: see `read_image`.

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
    images[index] = read_image(records[index].image, size, white_level)
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
  convert: Callable[[Image.Image, str | None], _T],
  encoded: bytes | None = None,
) -> _T:
  """Decodes a file in full, upright, converted; all faults as BadImageError.

  With `encoded`, the content of the file, the file itself is not read.
  """

  def upright(file: Image.Image) -> _T:
    kind = _source(file)  # A transposed copy no longer knows its format.
    return convert(ImageOps.exif_transpose(file), kind)

  return _use_opened(path, upright, encoded)


def _use_opened(
  path: str | os.PathLike,
  use: Callable[[Image.Image], _T],
  encoded: bytes | None = None,
) -> _T:
  """What `use` makes of an opened file; all faults as BadImageError."""
  path = os.fspath(path)
  suffix = os.path.splitext(path)[1].lower()
  if suffix in files.UNREAD:
    raise files.BadImageError(
      f'{path}: {suffix} is not read; convert the image, for example to PNG'
    )
  source = path if encoded is None else io.BytesIO(encoded)
  try:
    with _open(source, _formats(), None) as file:
      return use(file)
  except ImageTooLargeError as error:
    raise ImageTooLargeError(f'{path}: {error}') from None
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


def _source(file: Image.Image) -> str | None:
  """The file's format, or `_SIGNED_16` or `_COLOUR_16`."""
  tags = getattr(file, 'tag_v2', {})
  bits, kind = tags.get(258), tags.get(339)  # BitsPerSample, SampleFormat.
  if file.mode == 'I' and bits == (16,) and kind == (2,):
    return _SIGNED_16
  tiles = getattr(file, 'tile', ())  # How the decoder unpacks: 'RGB;16B'.
  if file.mode[0] != 'I' and any(';16' in str(tile[3]) for tile in tiles):
    return _COLOUR_16
  return file.format


def _to_rgb(
  image: Image.Image, source: str | None, white_level: int = 0
) -> Image.Image:
  """Returns an 8-bit RGB image, see read_image; source is of `_source`."""
  if image.mode[0] in 'IF':
    # Some Pillow versions open 16-bit PNG and PPM as 'I'.
    if image.mode in 'IF' and (image.mode, source) not in (
      ('I', 'PNG'),
      ('I', 'PPM'),
      ('I', _SIGNED_16),
    ):
      raise ValueError(
        f'32-bit pixels (Pillow mode {image.mode}); expected 8 or 16 bits'
      )
    white = white_level or (32767 if source == _SIGNED_16 else 65535)
    values = np.asarray(image).astype(np.int32)
    if values.min(initial=0) < 0:
      raise ValueError(
        f'{source} with values below 0 (the lowest is {values.min()}); expected'
        ' 0 and above'
      )
    values = (np.minimum(values, white) * 255 + white // 2) // white
    image = Image.fromarray(values.astype(np.uint8))
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
