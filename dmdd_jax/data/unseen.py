"""Validation pairs: defects on held-out normals that training never paints.

Training paints textures and patches of the image itself (synthesis.py), and a
student or head that learns those by heart scores well on more of the same,
whatever it does on a real defect. These are of other kinds: scratches, blurred,
tinted, missing and dented parts. docs/experiments/validation.md compares both.

Synopsis:

  images, masks = unseen.pairs(held_out, seed=1, count=40)
"""

from collections.abc import Callable

import cv2
import numpy as np

# Brightness of the picture: a lamp ages, and that is no defect.
_LIGHTING = 0.1
# A smaller change of every channel is not seen, and stays out of the mask.
_MIN_CHANGE = 0.02
_MIN_PIXELS, _TRIES = 8, 20
_GAP = 5  # Between changed pixels of one defect.


def pairs(
  images: np.ndarray,
  *,
  seed: int,
  count: int,
  foreground: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """A fixed set of pictures, half of them as they are, half with a defect.

  They depend on the arguments alone, not on what a run trains on, so that
  scores of runs compare.

  Args:
    images: (K, S, S, 3) uint8, K >= 1.
    seed: any integer; draws their order, and all else.
    count: of pictures, N; the images are taken in turn, as often as it needs.
    foreground: (K, S, S, 1) uint8, where defects begin; None is anywhere. An
      image with nothing of it stays without defect.

  Returns:
    The images (N, S, S, 3) uint8 and the masks of their defects (N, S, S)
    uint8 in {0, 1}.
  """
  pictures, masks = [], []
  order = np.random.default_rng(seed % 2**64).permutation(len(images))
  for number in range(count):
    rng = np.random.default_rng([seed % 2**64, number])
    repeat, place = divmod(number, len(images))
    which = order[place]
    lit = images[which] * rng.uniform(1.0 - _LIGHTING, 1.0 + _LIGHTING)
    image = np.minimum(lit / 255.0, 1.0).astype(np.float32)
    mask = np.zeros(image.shape[:2], np.uint8)
    if (place + repeat) % 2:
      # An image's own are of different kinds.
      kind = KINDS[(place // 2 + repeat // 2) % len(KINDS)]
      allowed = None if foreground is None else foreground[which, ..., 0]
      image, mask = _damage(rng, image, kind, allowed)
    pictures.append(np.rint(image * 255.0).astype(np.uint8))
    masks.append(mask)
  return np.stack(pictures), np.stack(masks)


def _damage(
  rng: np.random.Generator,
  image: np.ndarray,
  kind: str,
  allowed: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
  """The image (S, S, 3) in [0, 1] with a visible defect, and where it is."""
  size = image.shape[0]
  places = np.argwhere(np.ones((size, size)) if allowed is None else allowed)
  # Plain cloth that is blurred is plain cloth.
  for _ in range(_TRIES if len(places) else 0):
    y, x = places[rng.integers(len(places))]
    painted = np.clip(_PAINT[kind](rng, image, float(x), float(y)), 0.0, 1.0)
    mask = np.abs(painted - image).max(axis=-1) > _MIN_CHANGE
    if mask.sum() >= _MIN_PIXELS:
      # One outline, as a person would draw it, not every speck by itself.
      kernel = np.ones((_GAP, _GAP), np.uint8)
      mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
      return np.where(mask[..., np.newaxis], painted, image), mask
  return image, np.zeros((size, size), np.uint8)


def _ellipse(
  rng: np.random.Generator, size: int, x: float, y: float, least: float
) -> np.ndarray:
  """1 at (x, y), 0 at the edge of an ellipse, negative outside: (S, S).

  Its longer radius is between `least` and 1/6 of the image's side.
  """
  radius = size * np.exp(rng.uniform(np.log(least), np.log(1 / 6)))
  radii = radius, radius * rng.uniform(0.5, 1.0)
  angle = rng.uniform(0.0, np.pi)
  rows, columns = np.mgrid[:size, :size].astype(np.float32)
  along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
  across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
  return 1.0 - (along / radii[0]) ** 2 - (across / radii[1]) ** 2


def _scratch(
  rng: np.random.Generator, image: np.ndarray, x: float, y: float
) -> np.ndarray:
  """A curved line of one or a few pixels, brighter or darker."""
  size = image.shape[0]
  count = int(size * rng.uniform(0.04, 0.35))
  turns = rng.uniform(0.0, 2.0 * np.pi) + np.arange(count) * (
    rng.uniform(-8.0, 8.0) / size
  )
  points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], -1), axis=0)
  # In eighths of a pixel.
  points = np.rint((points + (x, y)) * 8).astype(np.int32)
  line = np.zeros((size, size), np.uint8)
  width = int(rng.integers(1, max(2, round(size / 64)) + 1))
  cv2.polylines(line, [points], False, 255, width, cv2.LINE_AA, 3)
  colour = rng.choice((-1.0, 1.0)) * rng.uniform(0.08, 0.35)
  colour = colour * rng.uniform(0.6, 1.0, 3)
  return image + (line / 255.0)[..., np.newaxis] * colour


def _blur(
  rng: np.random.Generator, image: np.ndarray, x: float, y: float
) -> np.ndarray:
  size = image.shape[0]
  inside = np.clip(4.0 * _ellipse(rng, size, x, y, 1 / 32), 0.0, 1.0)
  blurred = cv2.GaussianBlur(image, (0, 0), size / 256 * rng.uniform(1.5, 5.0))
  return image + inside[..., np.newaxis] * (blurred - image)


def _tint(
  rng: np.random.Generator, image: np.ndarray, x: float, y: float
) -> np.ndarray:
  """Darker or brighter, and of another hue."""
  inside = np.clip(2.0 * _ellipse(rng, image.shape[0], x, y, 1 / 40), 0.0, 1.0)
  gain = rng.uniform(*((0.55, 0.85), (1.15, 1.6))[rng.integers(2)])
  gains = gain * rng.uniform(0.85, 1.15, 3)
  return image + inside[..., np.newaxis] * image * (gains - 1.0)


def _missing(
  rng: np.random.Generator, image: np.ndarray, x: float, y: float
) -> np.ndarray:
  """What is there is painted over from around it."""
  inside = _ellipse(rng, image.shape[0], x, y, 1 / 64) > 0.0
  painted = cv2.inpaint(
    np.rint(image * 255.0).astype(np.uint8),
    inside.astype(np.uint8),
    5,
    cv2.INPAINT_TELEA,
  )
  return np.where(inside[..., np.newaxis], painted / 255.0, image)


def _dent(
  rng: np.random.Generator, image: np.ndarray, x: float, y: float
) -> np.ndarray:
  """The image drawn together or apart."""
  size = image.shape[0]
  inside = np.clip(_ellipse(rng, size, x, y, 1 / 25), 0.0, 1.0)
  pull = rng.choice((-0.5, 0.5)) * inside
  rows, columns = np.mgrid[:size, :size]
  return cv2.remap(
    image,
    (columns + pull * (columns - x)).astype(np.float32),
    (rows + pull * (rows - y)).astype(np.float32),
    cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_REFLECT,
  )


_PAINT: dict[str, Callable[..., np.ndarray]] = {
  'scratch': _scratch,
  'blur': _blur,
  'tint': _tint,
  'missing': _missing,
  'dent': _dent,
}
KINDS = tuple(_PAINT)
