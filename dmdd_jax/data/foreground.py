"""Masks of the object in images; anomalies are painted on the object alone.

'otsu' thresholds the brightness, 'grabcut' refines the result by colour. The
side of the threshold that fills most of the image's border is the background.
Masks are cached by the content of the image file, so a moved, copied or
replaced file never gets a wrong mask.

Synopsis:

  masks = foreground.load(records, size=256, kind='otsu')
"""

from collections.abc import Sequence
import concurrent.futures
import hashlib
import os
import tempfile

from absl import logging
import cv2
import numpy as np

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import records as records_lib

KINDS = ('off', 'otsu', 'grabcut')
_VERSION = 1  # Of `compute`'s result; part of a cached mask's name.
_GRABCUT_ROUNDS = 5
# A mask with a share of the image outside of these has failed.
_MIN_SHARE, _MAX_SHARE = 0.02, 0.98


def compute(image: np.ndarray, kind: str) -> np.ndarray:
  """The mask of the object in one image.

  Args:
    image: (H, W, 3) uint8 RGB.
    kind: 'otsu' or 'grabcut'.

  Returns:
    (H, W) uint8 in {0, 1}, 1 on the object; it may be all 0 or all 1.
  """
  gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  _, bright = cv2.threshold(gray, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
  border = np.concatenate(
    [bright[0], bright[-1], bright[1:-1, 0], bright[1:-1, -1]]
  )
  mask = 1 - bright if border.mean() > 0.5 else bright
  mask = _smooth(mask)
  if kind == 'grabcut' and 0 < np.count_nonzero(mask) < mask.size:
    labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    background, object_ = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # Its clusters start at random. The seed is per thread.
    cv2.grabCut(
      cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
      labels,
      (0, 0, 0, 0),  # Not read: the labels are given.
      background,
      object_,
      _GRABCUT_ROUNDS,
      cv2.GC_INIT_WITH_MASK,
    )
    mask = _smooth(np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)))
  return mask


def _smooth(mask: np.ndarray) -> np.ndarray:
  """Closes, then opens, by seven pixels of 256; RealNet does so by six.

  The side of the kernel is odd: an even one shifts a mask by a pixel.
  """
  side = 2 * max(1, round(3 * min(mask.shape) / 256)) + 1
  kernel = np.ones((side, side), np.uint8)
  mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
  return cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)


def load(
  records: Sequence[records_lib.Record],
  size: int,
  kind: str,
  cache: str | None = None,
  white_level: int = 0,
) -> np.ndarray:
  """The masks of images, from the cache if they are in it.

  Any number of processes may do this at once. If the cache cannot be written,
  masks are computed each time, and a warning says so.

  Args:
    records: N records.
    size: height and width to which the images are resized first.
    kind: 'otsu' or 'grabcut'.
    cache: a folder; None for dmdd_jax/foreground in the user's cache folder.
    white_level: see `images.read_image`.

  Returns:
    (N, size, size, 1) uint8 in {0, 1}, 1 on the object. A mask that covers less
    than 2 % or more than 98 % of its image has failed; it is 1 everywhere.

  Raises:
    ValueError: another kind.
    BadImageError: a file cannot be read.
  """
  if kind not in KINDS[1:]:
    raise ValueError(
      f'config.synthesis.foreground is {kind!r}; choose from {KINDS}'
    )
  folder = cache or _user_cache()
  masks = np.zeros((len(records), size, size, 1), np.uint8)

  def fill(index: int) -> bool:
    masks[index, ..., 0], kept = _cached(
      records[index].image, size, kind, folder, white_level
    )
    return kept

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    kept = list(pool.map(fill, range(len(records))))
  if not all(kept):
    logging.warning(
      'foreground masks cannot be kept in %s: they are computed again each'
      ' time. Set XDG_CACHE_HOME to a folder that can be written.',
      folder,
    )
  shares = masks.mean(axis=(1, 2, 3))
  masks[(shares < _MIN_SHARE) | (shares > _MAX_SHARE)] = 1
  logging.info(
    'foreground (%s): %.0f %% of the images on average',
    kind,
    100.0 * shares.mean() if len(shares) else 0.0,
  )
  return masks


def _user_cache() -> str:
  """The default folder of cached masks."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return os.path.join(home, 'dmdd_jax', 'foreground')


def _cached(
  path: str, size: int, kind: str, folder: str, white_level: int
) -> tuple[np.ndarray, bool]:
  """The mask (size, size) of a file, and whether the cache now holds it."""
  try:
    with open(path, 'rb') as file:
      content = file.read()
  except OSError as error:
    raise files.BadImageError(f'{path}: {error.strerror or error}') from None
  key = hashlib.blake2b(content, digest_size=20)
  key.update(f'/{_VERSION}/{kind}/{size}'.encode())
  if white_level:
    key.update(f'/{white_level}'.encode())
  name = os.path.join(folder, f'{key.hexdigest()}.png')
  mask = (
    cv2.imread(name, cv2.IMREAD_GRAYSCALE) if os.path.exists(name) else None
  )
  if mask is not None and mask.shape == (size, size):
    return (mask > 0).astype(np.uint8), True
  mask = compute(images_lib.read_image(path, size, white_level), kind)
  return mask, _keep(name, mask)


def _keep(name: str, mask: np.ndarray) -> bool:
  """Writes a mask at once; returns whether the folder could be written."""
  folder = os.path.dirname(name)
  try:
    os.makedirs(folder, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=folder, suffix='.draft')
    try:
      with os.fdopen(handle, 'wb') as file:
        file.write(cv2.imencode('.png', mask * 255)[1].tobytes())
      os.replace(draft, name)
    except BaseException:
      os.unlink(draft)
      raise
  except OSError:
    return False
  return True
