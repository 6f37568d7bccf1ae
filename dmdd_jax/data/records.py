"""Lists, checks and reads image folders; knows neither TensorFlow nor jax.

The layout here is MVTec AD's; `layouts` has the others:

  ROOT/CATEGORY/train/good/*.png
  ROOT/CATEGORY/test/good/*.png
  ROOT/CATEGORY/test/DEFECT/ID.png
  ROOT/CATEGORY/ground_truth/DEFECT/ID_mask.png

Synopsis:

  dataset = records.list_mvtec('data/mvtec', 'screw')
  train = records.validate(dataset.train, on_bad='skip')
  train, held_out = records.split_holdout(train, 0.1, 8, seed=0)
  images, masks = records.load_arrays(train, size=256)

Every fault a user can cause ends in one of three errors, which say what was
found, what was expected and what to do: `MissingDataError` (a file or folder
is not there), `DatasetError` (what is there is no data set) and `BadImageError`
(a file that cannot be used as an image or a mask).
"""

from collections.abc import Callable, Iterable, Sequence
import concurrent.futures
import dataclasses
import io
import os

from absl import logging
import numpy as np
from PIL import Image
from PIL import ImageOps

from dmdd_jax.data import files

SUFFIXES = files.SUFFIXES
MissingDataError = files.MissingDataError
DatasetError = files.DatasetError
BadImageError = files.BadImageError
GOOD = 'good'
# What a stranger may send: others (EPS, for one) start programs.
UPLOAD_FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP')


class ImageTooLargeError(BadImageError):
  """An image has more pixels than are allowed."""


@dataclasses.dataclass(frozen=True)
class Record:
  """One image on disk.

  Attributes:
    image: absolute path of the image.
    mask: absolute path of its mask, None for a good image; None for a
      defective one means that its defect's place is not known. Where it is a
      folder, the masks in it are laid over each other.
    label: 0 for good, 1 for defective; the folder decides.
    defect: name of the folder the image lies in, 'good' for label 0.
  """

  image: str
  mask: str | None
  label: int
  defect: str

  @property
  def has_truth(self) -> bool:
    """Whether it is known which of the pixels are defective."""
    return self.mask is not None or not self.label


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One category: its good training images and its test images."""

  category: str
  train: tuple[Record, ...]
  test: tuple[Record, ...]


# Listing.


def list_categories(root: str | os.PathLike) -> tuple[str, ...]:
  """Returns the sorted names of the folders in root that hold train/good.

  Args:
    root: the folder of the categories.

  Raises:
    MissingDataError: root is missing or no folder.
  """
  root = files.absolute(root)
  if not os.path.isdir(root):
    found = 'a file' if os.path.exists(root) else 'nothing'
    raise MissingDataError(
      f'Data root {root}: found {found}, expected a folder with one folder per '
      'category (ROOT/CATEGORY/train/good). Set --config.data.root to it.'
    )
  return tuple(
    name
    for name in files.folders(root)
    if os.path.isdir(os.path.join(root, name, 'train', GOOD))
  )


def list_mvtec(root: str | os.PathLike, category: str) -> Dataset:
  """Lists one category of a folder in the MVTec AD layout.

  Nothing is decoded here, see `validate`. Files whose name starts with a dot
  and files without an image suffix (`SUFFIXES`, any case) are ignored. A test
  split that is empty or has no defects is legal, and logged as a warning; so
  are masks without an image. A mask is ID_mask or ID with any image suffix.

  Args:
    root: the folder of the categories.
    category: the name of the category's folder.

  Returns:
    The category, train sorted by file name, test by defect and file name.

  Raises:
    MissingDataError: no root, category or train/good folder, or a defect image
      without a mask.
    DatasetError: no image in train/good, or a folder that cannot be read.
  """
  root = files.absolute(root)
  folder = _category_folder(root, category)
  train = list_good(folder)
  test_root = os.path.join(folder, 'test')
  test, unmasked = [], []
  defects = files.folders(test_root) if os.path.isdir(test_root) else ()
  for defect in defects:
    images = files.images(os.path.join(test_root, defect))
    if defect == GOOD:
      test += [Record(path, None, 0, GOOD) for path in images]
      continue
    masks = files.by_stem(os.path.join(folder, 'ground_truth', defect))
    for path in images:
      stem = files.stem(path)
      mask = masks.get(f'{stem}_mask') or masks.get(stem)
      test.append(Record(path, mask, 1, defect))
      if mask is None:
        unmasked.append(test[-1])
  if unmasked:
    raise MissingDataError(_unmasked_message(folder, unmasked))
  _warn_about_test(folder, test)
  return Dataset(category, train, tuple(test))


def _category_folder(root: str, category: str) -> str:
  """Returns the folder of a category, or raises with those that are there."""
  categories = list_categories(root)
  folder = os.path.join(root, category)
  if category and os.path.isdir(folder):
    return folder
  if categories:
    hint = f'The categories there are: {", ".join(categories)}.'
  elif os.path.isdir(os.path.join(root, 'train', GOOD)):
    hint = (
      f'This folder is itself a category: set --config.data.root to '
      f'{os.path.dirname(root)} and the category to {os.path.basename(root)}.'
    )
  else:
    names = ', '.join(files.folders(root)[:20]) or 'none'
    hint = (
      'No folder there holds train/good (folders found: '
      f'{names}). Set --config.data.root to the folder of the categories.'
    )
  raise MissingDataError(
    f'Data root {root}: found no category {category!r}, expected the folder '
    f'{folder} with train/good. {hint}'
  )


def list_good(folder: str) -> tuple[Record, ...]:
  """Lists train/good of the folder of a category in the MVTec AD layout.

  Raises:
    MissingDataError: there is no such folder.
    DatasetError: it holds no image.
  """
  good = os.path.join(folder, 'train', GOOD)
  expected = (
    f'expected defect-free training images ({" ".join(SUFFIXES)}) directly in '
    f'{good}'
  )
  if not os.path.isdir(good):
    train = os.path.join(folder, 'train')
    names = files.folders(train if os.path.isdir(train) else folder)
    raise MissingDataError(
      f'Category {folder}: found no folder train/good (folders found: '
      f'{", ".join(names[:20]) or "none"}), {expected}. Move them there, or '
      'choose another category or --config.data.root.'
    )
  images = files.images(good)
  if not images:
    others = [name for name in sorted(os.listdir(good)) if name[0] != '.']
    raise DatasetError(
      f'Category {folder}: found no image in train/good '
      f'({files.some(others) or "it is empty"}), {expected}. Copy them '
      'there, or choose another category or --config.data.root.'
    )
  return tuple(Record(path, None, 0, GOOD) for path in images)


def _unmasked_message(folder: str, unmasked: Sequence[Record]) -> str:
  """Returns the error text for defect images that have no mask."""
  first = unmasked[0]
  masks = os.path.join(folder, 'ground_truth', first.defect)
  stem = files.stem(first.image)
  more = ''
  if len(unmasked) > 1:
    rest = [f'{r.defect}/{os.path.basename(r.image)}' for r in unmasked[1:]]
    more = f' The same holds for {len(rest)} more: {files.some(rest)}.'
  return (
    f'Defect image {first.image}: found no mask, expected '
    f'{os.path.join(masks, stem)}_mask.png or {os.path.join(masks, stem)}.png '
    f'(or another of {" ".join(SUFFIXES)}).{more} Add the masks, or move the '
    'images out of test/.'
  )


def _warn_about_test(folder: str, test: Sequence[Record]) -> None:
  """Logs what is odd but legal in a test split."""
  used = {record.mask for record in test}
  truth = os.path.join(folder, 'ground_truth')
  unused = []
  for defect in files.folders(truth) if os.path.isdir(truth) else ():
    if defect != GOOD:
      masks = files.images(os.path.join(truth, defect))
      unused += [
        f'{defect}/{os.path.basename(m)}' for m in masks if m not in used
      ]
  if unused:
    logging.warning(
      'Masks in %s without an image in test/, ignored: %d: %s',
      truth,
      len(unused),
      files.some(unused),
    )
  labels = {record.label for record in test}
  if not labels:
    logging.warning('%s/test holds no images: nothing to evaluate.', folder)
  elif labels != {0, 1}:
    logging.warning(
      '%s/test holds only %s images: metrics that need both will be NaN.',
      folder,
      'good' if labels == {0} else 'defective',
    )


# Checking.


def validate(
  records: Iterable[Record], on_bad: str = 'error', num_threads: int = 0
) -> tuple[Record, ...]:
  """Decodes every image and mask in full and returns the usable records.

  A mask must have its image's height and width, both after their EXIF
  orientation. A defect image whose mask is all zero is kept, with a warning.

  Args:
    records: what to check.
    on_bad: 'error' raises at a bad file; 'skip' drops its record, with a
      warning that names it, and a count.
    num_threads: threads that decode; 0 for one per processor.

  Returns:
    The records without the dropped ones, in their order.

  Raises:
    BadImageError: a bad file under 'error' (the first in the order of records;
      the others are named too), or nothing left under 'skip'.
    ValueError: another on_bad.
  """
  if on_bad not in ('error', 'skip'):
    raise ValueError(
      f"data.on_bad_image: found {on_bad!r}, expected 'error' or 'skip'."
    )
  records = tuple(records)
  faults = _map_threads(_fault, records, num_threads)
  bad = [fault for fault in faults if fault]
  if bad and on_bad == 'error':
    more = ''
    if len(bad) > 1:
      more = f' And {len(bad) - 1} more: {files.some(bad[1:], sep="; ")}.'
    raise BadImageError(
      f'{bad[0]}.{more} Replace or remove the file, or leave bad files out '
      'with --config.data.on_bad_image=skip.'
    )
  for fault in bad:
    logging.warning('Skipped: %s.', fault)
  kept = tuple(r for r, fault in zip(records, faults, strict=True) if not fault)
  if bad and not kept:
    raise BadImageError(
      f'All {len(records)} images are unusable, the first: {bad[0]}. '
      'Check that --config.data.root is the folder you mean.'
    )
  if bad:
    logging.warning('Skipped %d of %d images.', len(bad), len(records))
  return kept


def _fault(record: Record) -> str | None:
  """Returns what is wrong with the files of a record, None for nothing."""
  try:
    image = _read(record.image, _to_rgb)
    if record.mask is None:
      return None
    mask = _read_binary(record.mask)
  except BadImageError as error:
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


# Reading.


def read_image(path: str | os.PathLike, size: int | None) -> np.ndarray:
  """Reads an image as 8-bit RGB.

  The EXIF orientation is applied. 16-bit greyscale is scaled from its full
  range (0-65535 to 0-255), not stretched. Palette and greyscale become RGB.
  Transparent images are laid over black: what colour a file stores under
  transparent pixels depends on the program that wrote it. Of several frames
  the first is read. An image of another size is resized to the square with an
  antialiased bilinear filter, its aspect ratio not kept.

  Args:
    path: the file.
    size: height and width of the result; None for those of the file.

  Returns:
    uint8 (size, size, 3) in [0, 255].

  Raises:
    BadImageError: the file is missing, no image, truncated, or of 32-bit
      integers or floats, whose range is unknown.
  """
  image = np.asarray(_read(path, _to_rgb))
  return image if size is None else resize_image(image, size)


def decode_image(content: bytes, max_pixels: int) -> np.ndarray:
  """Reads an image of a stranger, like `read_image`.

  Args:
    content: of a file in one of `UPLOAD_FORMATS`.
    max_pixels: a larger image is refused by its header, before it is decoded.

  Returns:
    uint8 (H, W, 3).

  Raises:
    ImageTooLargeError: it has more pixels.
    BadImageError: it is no such image, or damaged.
  """
  try:
    with Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS) as file:
      if file.width * file.height > max_pixels:
        raise ImageTooLargeError(
          f'the image has {file.width} x {file.height} pixels; at most'
          f' {max_pixels} are allowed'
        )
      return np.asarray(_to_rgb(ImageOps.exif_transpose(file), file.format))
  except BadImageError:
    raise
  except Image.DecompressionBombError as error:
    raise ImageTooLargeError(str(error)) from error
  except Image.UnidentifiedImageError:
    fault = f'is none of {", ".join(UPLOAD_FORMATS)}'
  except Exception as error:  # As in `_read`.
    fault = f'cannot be decoded ({str(error) or type(error).__name__})'
  raise BadImageError(f'the image ({len(content)} bytes) {fault}')


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes (H, W, 3) or (H, W) uint8 to RGB (size, size, 3), antialiased."""
  picture = Image.fromarray(image).convert('RGB')
  if picture.size != (size, size):
    picture = picture.resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(picture)


def read_mask(path: str | os.PathLike, size: int | None) -> np.ndarray:
  """Reads a mask; a pixel that is not black is anomalous.

  The EXIF orientation is applied, transparent pixels count as black. In a JPEG
  the brighter half of the range counts, as its compression leaves near-black
  noise around edges. Resized by nearest neighbour.

  Args:
    path: the file.
    size: height and width of the result; None for those of the file.

  Returns:
    uint8 (size, size, 1) in {0, 1}.

  Raises:
    BadImageError: as for `read_image`.
  """
  mask = _read_binary(path)
  if size is not None and mask.size != (size, size):
    mask = mask.resize((size, size), Image.Resampling.NEAREST)
  return np.asarray(mask)[..., np.newaxis]


def native_mask(record: Record) -> np.ndarray:
  """The mask (H, W) uint8 in {0, 1} at its own size; zeros without one."""
  if record.mask is not None:
    return read_mask(record.mask, None)[..., 0]
  return np.zeros(read_image(record.image, None).shape[:2], np.uint8)


def load_arrays(
  records: Sequence[Record], size: int, num_threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Reads all images and masks into memory; see `read_image`, `read_mask`.

  Args:
    records: what to read, N records.
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
    if records[index].mask is not None:
      masks[index] = read_mask(records[index].mask, size)

  _map_threads(fill, range(len(records)), num_threads)
  return images, masks


def _read_binary(path: str | os.PathLike) -> Image.Image:
  """Decodes a mask, or all masks of a folder into one."""
  if not os.path.isdir(path):
    return _read(path, _to_binary)
  masks = [_read(name, _to_binary) for name in files.images(os.fspath(path))]
  if not masks or len({mask.size for mask in masks}) > 1:
    found = 'no mask in this folder'
    if masks:
      found = 'its masks differ in size'
    raise BadImageError(f'{os.fspath(path)}: {found}')
  union = np.max([np.asarray(mask) for mask in masks], axis=0)
  return Image.fromarray(union)


def _read(
  path: str | os.PathLike,
  convert: Callable[[Image.Image, str], Image.Image],
  encoded: bytes | None = None,
) -> Image.Image:
  """Decodes a file in full, upright, converted; all faults as BadImageError.

  Where its content is at hand, `encoded`, the file itself is not looked at.
  """
  path = os.fspath(path)
  try:
    with Image.open(path if encoded is None else io.BytesIO(encoded)) as file:
      # A transposed copy no longer knows its format.
      return convert(ImageOps.exif_transpose(file), file.format)
  except FileNotFoundError:
    fault = 'no such file (or a link to a missing one)'
  except Image.UnidentifiedImageError:
    size = os.path.getsize(path) if encoded is None else len(encoded)
    fault = f'not an image Pillow knows ({size} bytes)'
  # Pillow's decoders raise what they like on corrupt bytes: OSError,
  # SyntaxError, struct.error, IndexError, DecompressionBombError...
  except Exception as error:
    fault = f'cannot be decoded ({str(error) or type(error).__name__})'
  raise BadImageError(f'{path}: {fault}')


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
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


def _to_binary(image: Image.Image, source: str) -> Image.Image:
  """Returns an 8-bit image in {0, 1}, see read_mask."""
  if image.mode[0] in 'IF':  # Before scaling: 1 of 65535 would become 0.
    values = np.asarray(image) != 0
  else:
    lowest = 128 if source == 'JPEG' else 1
    values = np.asarray(_to_rgb(image, source)).max(axis=-1) >= lowest
  return Image.fromarray(values.astype(np.uint8))


# Splitting.


def split_holdout(
  records: Iterable[Record], fraction: float, minimum: int, seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
  """Holds some records out of training, for calibration and validation.

  The choice depends on the file names and the seed alone: not on the order of
  the records, nor on where the data lies.

  Args:
    records: N records.
    fraction: share to hold out, in [0, 0.5]; 0 holds nothing out.
    minimum: hold out at least as many, when fraction > 0; but never more than
      half of the records, rounded down (so none of one).
    seed: any integer.

  Returns:
    (train, held_out), both sorted by path.

  Raises:
    ValueError: fraction outside [0, 0.5], or minimum negative.
  """
  if not 0 <= fraction <= 0.5:
    raise ValueError(f'Held-out fraction: found {fraction}, expected [0, 0.5].')
  if minimum < 0:
    raise ValueError(f'Held-out minimum: found {minimum}, expected >= 0.')
  records = sorted(records, key=lambda record: record.image)
  count = max(minimum, round(fraction * len(records))) if fraction else 0
  count = min(count, len(records) // 2)
  drawn = sorted(records, key=lambda record: files.draw(record.image, seed))
  held_out = frozenset(drawn[:count])
  return (
    tuple(record for record in records if record not in held_out),
    tuple(record for record in records if record in held_out),
  )


# Textures.


def list_textures(path: str | os.PathLike) -> tuple[str, ...]:
  """Returns the sorted paths of all images in a folder and those below it.

  For DTD give its root or its images/ folder. Links are followed; hidden files
  and folders are ignored.

  Raises:
    MissingDataError: the folder is missing.
    DatasetError: there is no image in it.
  """
  path = files.absolute(path)
  way_out = (
    'Set --config.data.textures to a folder of images, or leave it empty for '
    'procedural textures.'
  )
  if not os.path.isdir(path):
    found = 'a file' if os.path.exists(path) else 'nothing'
    raise MissingDataError(
      f'Texture folder {path}: found {found}, expected a folder of images (any '
      f'depth). {way_out}'
    )
  found = files.images_below(path)
  if not found:
    raise DatasetError(
      f'Texture folder {path}: found no image, expected at least one file with '
      f'a suffix of {" ".join(SUFFIXES)} (any depth). {way_out}'
    )
  return found


def load_textures(
  paths: Sequence[str],
  size: int,
  limit: int = 0,
  seed: int = 0,
  num_threads: int = 0,
) -> np.ndarray:
  """Reads textures, each the largest square at its centre, resized.

  Args:
    paths: the files.
    size: height and width of the result.
    limit: read at most as many, chosen by file name and seed; 0 for all.
    seed: of the choice.
    num_threads: threads that decode; 0 for one per processor.

  Returns:
    uint8 (T, size, size, 3) in [0, 255], T = min(limit, len(paths)), in the
    order of the sorted paths.

  Raises:
    BadImageError: a chosen file cannot be read.
  """
  paths = sorted(paths)
  if limit and limit < len(paths):
    paths = sorted(
      sorted(paths, key=lambda path: files.draw(path, seed))[:limit]
    )
  textures = np.zeros((len(paths), size, size, 3), np.uint8)

  def fill(index: int) -> None:
    textures[index] = read_texture(paths[index], size)

  _map_threads(fill, range(len(paths)), num_threads)
  return textures


def read_texture(
  path: str, size: int, encoded: bytes | None = None
) -> np.ndarray:
  """Reads the largest square at an image's centre, resized.

  Args:
    path: the file.
    size: height and width of the result.
    encoded: the content of the file, where it is at hand; path is its name.

  Returns:
    uint8 (size, size, 3) in [0, 255].

  Raises:
    BadImageError: it cannot be read.
  """
  try:
    image = _read(path, _to_rgb, encoded)
  except BadImageError as error:
    raise BadImageError(
      f'Texture {error}. Remove it from the textures.'
    ) from None
  return np.asarray(
    ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
  )


# Small helpers.


def _map_threads(function: Callable, items: Iterable, num_threads: int) -> list:
  """Returns [function(item) ...] in order; Pillow decodes without the GIL."""
  workers = num_threads or os.cpu_count() or 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return list(pool.map(function, items))
