"""Makes the demo set: pictures of a woven part, with defects and exact masks.

The part is a piece of cloth with two eyelets and two prints in fixed places.
Position, weave, light and grain vary from picture to picture. A defective
picture and its clean twin come from the same random state and are equal outside
of the mask, so the mask is exact.

Synopsis:

  surfaces.write_surfaces('demo', size=128)
  dataset = layouts.list_mvtec('demo', surfaces.CATEGORY)

The defects in `ORDINARY` are spots and lines, like synthetic anomalies. Those
in `HELD_OUT` (a part missing or moved, a third of the picture in another weave)
are unlike any synthetic anomaly. They show how a model that was trained on
synthetic anomalies handles other defects.

Pictures depend on the seed, the size and their name alone, through NumPy's
Philox generator. They are the same on every run; other processors may round a
grey level differently.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import shutil
from typing import Any
import uuid

import numpy as np
from PIL import Image

from dmdd_jax.data import files
from dmdd_jax.data import noise
from dmdd_jax.data import records

CATEGORY = 'surface'
MARKER = 'surfaces.json'
_GENERATOR = 'dmdd_jax.data.surfaces'
VERSION = 1  # Raise when the pictures change: existing sets are then redone.

# Lengths are fractions of the picture's side, coordinates are (x, y).
_THREADS = 18  # Across the picture.
_EYELET_RADIUS = 0.085
_LOGO_RADIUS = 0.125
_CODE_RADIUS = 0.115
_PLACES = {
  'eyelet_1': (0.20, 0.20, _EYELET_RADIUS),
  'eyelet_2': (0.80, 0.80, _EYELET_RADIUS),
  'logo': (0.67, 0.31, _LOGO_RADIUS),
  'code': (0.31, 0.70, _CODE_RADIUS),
}
_WARP = np.array((0.60, 0.63, 0.64))
_WEFT = np.array((0.49, 0.54, 0.58))
_INK = np.array((0.13, 0.17, 0.27))
_BRASS = np.array((0.74, 0.66, 0.47))


@dataclasses.dataclass(frozen=True)
class _Scene:
  """The random state of one picture without its defect.

  x and y are the part's own coordinates at each pixel; fields are (S, S).
  """

  x: np.ndarray
  y: np.ndarray
  phase: np.ndarray  # (2,) of the weave, in threads
  tones: np.ndarray  # (2, 64) brightness of single warp and weft threads
  slack: np.ndarray  # (2, S, S) displacement of the threads, in threads
  fibre: np.ndarray  # fine noise along the threads
  light: np.ndarray  # illumination, about 1
  light_angle: float
  grain: np.ndarray  # (S, S, 3) noise of the camera

  @property
  def size(self) -> int:
    """Height and width S of the picture."""
    return self.x.shape[0]


def _step(distance: np.ndarray, size: int) -> np.ndarray:
  """Returns 1 inside (distance < 0), 0 outside, one pixel of soft edge."""
  return np.clip(0.5 - distance * size, 0, 1)


# The part.


def _scene(rng: np.random.Generator, size: int) -> _Scene:
  """Draws a picture's random state."""
  angle = rng.uniform(-0.02, 0.02)
  shift = rng.uniform(-0.012, 0.012, 2)
  centres = (np.arange(size) + 0.5) / size - 0.5
  py, px = np.meshgrid(centres, centres, indexing='ij')
  light_angle = rng.uniform(0, 2 * np.pi)
  slope = rng.uniform(0.05, 0.2)
  slope = slope * (np.cos(light_angle) * px + np.sin(light_angle) * py)
  gain = rng.uniform(0.95, 1.05)
  mottle = noise.band_limited(rng, size, 2.5)
  fibre = noise.band_limited(rng, size, 40 * size / 128, stretch=5)
  fibre = fibre + noise.band_limited(
    rng, size, 40 * size / 128, stretch=5, angle=np.pi / 2
  )
  return _Scene(
    x=np.cos(angle) * px + np.sin(angle) * py + 0.5 + shift[0],
    y=np.cos(angle) * py - np.sin(angle) * px + 0.5 + shift[1],
    phase=rng.uniform(0, 2, 2),
    tones=rng.normal(1, 0.025, (2, 64)),
    slack=np.stack([0.08 * noise.band_limited(rng, size, 3) for _ in range(2)]),
    fibre=0.02 * fibre,
    light=gain * (1 + slope + 0.015 * mottle),
    light_angle=light_angle,
    grain=rng.normal(0, 0.01, (size, size, 3)),
  )


def _cloth(scene: _Scene, angle: float = 0.0) -> np.ndarray:
  """Returns the plain weave, float (S, S, 3), turned by angle (radians)."""
  x, y = scene.x - 0.5, scene.y - 0.5
  u = (np.cos(angle) * x + np.sin(angle) * y) * _THREADS
  v = (np.cos(angle) * y - np.sin(angle) * x) * _THREADS
  u = u + scene.phase[0] + scene.slack[0]
  v = v + scene.phase[1] + scene.slack[1]
  column, row = np.floor(u).astype(int), np.floor(v).astype(int)
  # A thread is darkest at its sides, and where it dives under the next.
  across_u = np.sin(np.pi * (u - column)) ** 0.7
  across_v = np.sin(np.pi * (v - row)) ** 0.7
  warp = (0.62 + 0.38 * across_u) * (0.85 + 0.15 * across_v)
  weft = (0.62 + 0.38 * across_v) * (0.85 + 0.15 * across_u)
  warp = (warp * scene.tones[0][column % 64])[..., np.newaxis] * _WARP
  weft = (weft * scene.tones[1][row % 64])[..., np.newaxis] * _WEFT
  on_top = ((column + row) % 2 == 0)[..., np.newaxis]
  return np.where(on_top, warp, weft) * (1 + scene.fibre[..., np.newaxis])


def _eyelet(
  scene: _Scene, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns coverage (S, S) and colour (S, S, 3) of an eyelet at the origin."""
  radius = np.hypot(x, y)
  hole = _step(radius - 0.55 * _EYELET_RADIUS, scene.size)
  # The rim is half a torus: lit on the side that faces the light.
  tilt = (radius / _EYELET_RADIUS - 0.775) / 0.225
  facing = np.cos(np.arctan2(y, x) - scene.light_angle)
  rim = 0.86 + 0.28 * np.clip(tilt, -1, 1) * facing - 0.12 * tilt**2
  colour = rim[..., np.newaxis] * _BRASS
  colour = colour + hole[..., np.newaxis] * (0.07 - colour)
  return _step(radius - _EYELET_RADIUS, scene.size), colour


def _logo(scene: _Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the coverage (S, S) of a ring around two bars and a dot."""
  radius = np.hypot(x, y)
  ring = np.abs(radius - 0.88 * _LOGO_RADIUS) - 0.12 * _LOGO_RADIUS
  bars = np.minimum(
    _box(x + 0.035, y, 0.013, 0.058), _box(x, y - 0.045, 0.048, 0.013)
  )
  dot = np.hypot(x - 0.03, y + 0.025) - 0.022
  return _step(np.minimum(np.minimum(ring, bars), dot), scene.size)


def _code(scene: _Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the coverage (S, S) of a row of printed bars."""
  bars = [(-0.09, 0.012), (-0.05, 0.02), (-0.012, 0.009), (0.03, 0.016)]
  bars.append((0.078, 0.022))
  distance = [_box(x - at, y, half, 0.06) for at, half in bars]
  return _step(np.minimum.reduce(distance), scene.size)


def _box(
  x: np.ndarray, y: np.ndarray, half_x: float, half_y: float
) -> np.ndarray:
  """Returns the approximate signed distance to an upright box at the origin."""
  return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


def _paint(
  image: np.ndarray,
  scene: _Scene,
  part: str,
  moved: tuple[float, float] = (0.0, 0.0),
) -> tuple[np.ndarray, np.ndarray]:
  """Puts a part on the cloth, displaced by moved; also its coverage (S, S)."""
  x = scene.x - _PLACES[part][0] - moved[0]
  y = scene.y - _PLACES[part][1] - moved[1]
  if part.startswith('eyelet'):
    coverage, colour = _eyelet(scene, x, y)
  else:  # The weave shows through the ink.
    coverage = (_logo if part == 'logo' else _code)(scene, x, y)
    colour = 0.3 * image + 0.7 * _INK
  alpha = coverage[..., np.newaxis]
  return image + alpha * (colour - image), coverage


def _assemble(
  scene: _Scene,
  cloth: np.ndarray,
  missing: str | None = None,
  moved: tuple[float, float] | None = None,
) -> np.ndarray:
  """Returns cloth with all parts but `missing`, which moved displaces."""
  image = cloth
  for part in _PLACES:
    if part != missing:
      image, _ = _paint(image, scene, part)
    elif moved is not None:
      image, _ = _paint(image, scene, part, moved)
  return image


def _holes(scene: _Scene) -> np.ndarray:
  """Returns the coverage (S, S) of the eyelets' holes: no defect lies there."""
  holes = np.zeros_like(scene.x)
  for part in ('eyelet_1', 'eyelet_2'):
    x, y = scene.x - _PLACES[part][0], scene.y - _PLACES[part][1]
    radius = np.hypot(x, y)
    holes += _step(radius - 0.55 * _EYELET_RADIUS, scene.size)
  return holes


def _expose(scene: _Scene, image: np.ndarray) -> np.ndarray:
  """Returns the uint8 photograph of a part: light, then the camera's grain."""
  lit = image * scene.light[..., np.newaxis] + scene.grain
  return np.clip(np.rint(lit * 255), 0, 255).astype(np.uint8)


# The defects: each takes the generator, the scene and the clean part, and
# returns the defective part and its mask.


def _curve(rng: np.random.Generator, length: float, bend: float) -> np.ndarray:
  """Returns points (96, 2) along a random curve inside the picture.

  bend is the deviation of the total turn, in radians.
  """
  count = 96
  turn = bend * np.cumsum(rng.normal(0, 1, 4)) / 2
  while True:
    start = rng.uniform(0, 2 * np.pi)
    angle = start + np.interp(np.linspace(0, 3, count), range(4), turn)
    steps = length / count * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    points = np.cumsum(steps, axis=0)
    points = points - points.mean(axis=0) + rng.uniform(0.15, 0.85, 2)
    if points.min() > 0.03 and points.max() < 0.97:
      return points


def _distance_to(
  scene: _Scene, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (S, S) distance to the nearest of the points (N, 2), and (S, S) its
  place along them in [0, 1].
  """
  pixels = np.stack([scene.x, scene.y], axis=-1).reshape(-1, 2)
  square = np.full(len(pixels), np.inf)
  nearest = np.zeros(len(pixels))
  for index, point in enumerate(points):
    candidate = ((pixels - point) ** 2).sum(axis=-1)
    closer = candidate < square
    square[closer], nearest[closer] = candidate[closer], index
  shape = scene.x.shape
  place = nearest.reshape(shape) / (len(points) - 1)
  return np.sqrt(square).reshape(shape), place


def _scratch(
  rng: np.random.Generator, scene: _Scene, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A thin line of frayed, lighter threads, fading towards its ends."""
  points = _curve(rng, rng.uniform(0.3, 0.6), 0.25)
  distance, place = _distance_to(scene, points)
  width = rng.uniform(0.008, 0.013) * (0.4 + 0.6 * np.sin(np.pi * place))
  alpha = _step(distance - width, scene.size) * (1 - _holes(scene))
  alpha = alpha * rng.uniform(0.6, 0.8)
  tone = rng.choice((0.95, 0.95, 0.12)) * np.array((1.0, 0.99, 0.96))
  defective = image + alpha[..., np.newaxis] * (tone - image)
  return defective, alpha > 0.15


def _stain(
  rng: np.random.Generator, scene: _Scene, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A dark, soft, irregular spot that lets the weave through."""
  radius = rng.uniform(0.06, 0.12)
  centre = rng.uniform(0.15, 0.85, 2)
  squeeze = rng.uniform(0.75, 1.3)
  ragged = 1 + 0.13 * noise.band_limited(rng, scene.size, 5)
  x, y = (scene.x - centre[0]) * squeeze, (scene.y - centre[1]) / squeeze
  relative = np.hypot(x, y) / radius * ragged
  depth = rng.uniform(0.45, 0.6) / (1 + np.exp((relative - 1) * 9))
  depth = depth * (1 - np.clip(_holes(scene), 0, 1))
  tint = np.array((0.85, 1.0, 1.15))  # Oil: absorbs blue most.
  return image * (1 - depth[..., np.newaxis] * tint), depth > 0.1


def _dent(
  rng: np.random.Generator, scene: _Scene, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A crater: one flank in the shade, the other lit, the ground darker."""
  radius = rng.uniform(0.07, 0.11)
  while True:
    centre = rng.uniform(0.13, 0.87, 2)
    if all(
      np.hypot(centre[0] - x, centre[1] - y) > 0.7 * (radius + r)
      for x, y, r in _PLACES.values()
    ):
      break
  squeeze = rng.uniform(0.8, 1.25)
  x, y = (scene.x - centre[0]) * squeeze, (scene.y - centre[1]) / squeeze
  relative = np.hypot(x, y) / radius
  inside = np.clip(1 - relative**2, 0, None)
  facing = np.cos(np.arctan2(y, x) - scene.light_angle)
  slope = 2.6 * relative * inside * facing  # Of the height -(1 - r^2)^2.
  shade = -rng.uniform(0.4, 0.5) * slope - 0.3 * inside
  return image * (1 + shade[..., np.newaxis]), inside > 0.08


def _thread(
  rng: np.random.Generator, scene: _Scene, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A foreign fibre lying on the part, in a muted colour."""
  colours = (
    (0.16, 0.15, 0.15),
    (0.50, 0.38, 0.22),
    (0.28, 0.38, 0.30),
    (0.86, 0.84, 0.76),
    (0.42, 0.24, 0.24),
  )
  colour = np.array(colours[rng.integers(len(colours))])
  points = _curve(rng, rng.uniform(0.4, 0.8), 1.6)
  distance, place = _distance_to(scene, points)
  width = rng.uniform(0.011, 0.016)
  alpha = _step(distance - width, scene.size)
  twist = 0.08 * np.sin(2 * np.pi * place * rng.uniform(14, 24))
  round_ = 1.08 - 0.3 * np.clip(distance / width, 0, 1) ** 2 + twist
  fibre = round_[..., np.newaxis] * colour
  return image + alpha[..., np.newaxis] * (fibre - image), alpha > 0.25


def _part_missing(
  rng: np.random.Generator, scene: _Scene, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """One part is not there; the mask is where it should be."""
  part = rng.choice(sorted(_PLACES))
  cloth = _cloth(scene)
  _, coverage = _paint(cloth, scene, part)
  return _assemble(scene, cloth, missing=part), coverage > 0.1


def _part_moved(
  rng: np.random.Generator, scene: _Scene, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """One part lies elsewhere; the mask covers the old and the new place."""
  part = rng.choice(sorted(_PLACES))
  px, py, radius = _PLACES[part]
  others = [place for name, place in _PLACES.items() if name != part]
  while True:
    reach, angle = rng.uniform(0.1, 0.25), rng.uniform(0, 2 * np.pi)
    moved = (reach * np.cos(angle), reach * np.sin(angle))
    x, y = px + moved[0], py + moved[1]
    inside = radius + 0.02 < min(x, y) and max(x, y) < 0.98 - radius
    if inside and all(
      np.hypot(x - ox, y - oy) > radius + r + 0.01 for ox, oy, r in others
    ):
      break
  cloth = _cloth(scene)
  _, old = _paint(cloth, scene, part)
  _, new = _paint(cloth, scene, part, moved)
  defective = _assemble(scene, cloth, missing=part, moved=moved)
  return defective, np.maximum(old, new) > 0.1


def _large_area(
  rng: np.random.Generator, scene: _Scene, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """About a third of the cloth is woven at another angle, in another tone."""
  angle = rng.uniform(0, 2 * np.pi)
  along = np.cos(angle) * (scene.x - 0.5) + np.sin(angle) * (scene.y - 0.5)
  field = along + 0.03 * noise.band_limited(rng, scene.size, 2)
  # A third of the pixels, whatever the edge's shape.
  region = field > np.quantile(field, 1 - rng.uniform(0.28, 0.38))
  tone = rng.choice((0.78, 1.18)) * np.array((1.0, 0.99, 0.97))
  other = _cloth(scene, rng.uniform(0.4, 1.1)) * tone
  cloth = np.where(region[..., np.newaxis], other, _cloth(scene))
  covered = np.zeros_like(scene.x)
  for part in _PLACES:
    covered = np.maximum(covered, _paint(cloth, scene, part)[1])
  return _assemble(scene, cloth), region & (covered < 0.5)


_Paint = Callable[
  [np.random.Generator, _Scene, np.ndarray], tuple[np.ndarray, np.ndarray]
]
_DEFECTS: dict[str, _Paint] = {
  'scratch': _scratch,
  'stain': _stain,
  'dent': _dent,
  'thread': _thread,
  'part_missing': _part_missing,
  'part_moved': _part_moved,
  'large_area': _large_area,
}
ORDINARY = ('scratch', 'stain', 'dent', 'thread')
HELD_OUT = ('part_missing', 'part_moved', 'large_area')


def surface(
  name: str, size: int, seed: int = 0, defect: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Makes one picture.

  With the same name, a defective picture is the twin of the clean one.

  Args:
    name: any text; pictures of different names are independent.
    size: height and width.
    seed: any integer.
    defect: one of `ORDINARY` and `HELD_OUT`, None for a clean picture.

  Returns:
    image uint8 (size, size, 3) in [0, 255], and mask uint8 (size, size) in
    {0, 1}. Where the mask is 0 the image equals the clean one.
  """
  scene = _scene(noise.generator(seed, name), size)
  part = _assemble(scene, _cloth(scene))
  clean = _expose(scene, part)
  if defect is None:
    return clean, np.zeros((size, size), np.uint8)
  part, mask = _DEFECTS[defect](
    noise.generator(seed, f'{name}/{defect}'), scene, part
  )
  image = np.where(mask[..., np.newaxis], _expose(scene, part), clean)
  return image, mask.astype(np.uint8)


# Writing.


def write_surfaces(
  root: str | os.PathLike,
  *,
  size: int = 128,
  train: int = 60,
  test_good: int = 20,
  per_defect: int = 6,
  seed: int = 0,
  defects: Sequence[str] = ORDINARY,
) -> str:
  """Writes ROOT/surface in the MVTec AD layout, as PNG; see layouts.py.

  An existing set with the same arguments is kept, one with other arguments is
  replaced. The set is built beside its place and moved there when complete, so
  an interrupted call leaves no incomplete set.

  Args:
    root: where the category's folder goes; made when missing.
    size: height and width, at least 32.
    train: number of training images, at least 1.
    test_good: number of good test images.
    per_defect: number of test images per kind of defect.
    seed: any integer.
    defects: kinds out of `ORDINARY` and `HELD_OUT`.

  Returns:
    The path of ROOT/surface.

  Raises:
    ValueError: an argument is out of range, or a defect unknown.
    files.DatasetError: ROOT cannot be written, or ROOT/surface holds
      something that this function did not write.
  """
  _check_arguments(size, train, test_good, per_defect, defects)
  root = os.path.abspath(os.path.expanduser(os.fspath(root)))
  target = os.path.join(root, CATEGORY)
  parameters = {
    'generator': _GENERATOR,
    'version': VERSION,
    'size': size,
    'train': train,
    'test_good': test_good,
    'per_defect': per_defect,
    'seed': seed,
    'defects': list(defects),
  }
  if _is_written(target, parameters):
    return target
  building = os.path.join(root, f'.{CATEGORY}-{uuid.uuid4().hex}')
  try:
    os.makedirs(building)
    _write_pictures(building, parameters)
    _swap(building, target, parameters)
  except OSError as error:
    raise files.DatasetError(
      f'Demo set {target}: cannot be written ({error.strerror or error}), '
      'expected a folder with write access and a few MB of space. Choose '
      'another folder.'
    ) from error
  finally:
    shutil.rmtree(building, ignore_errors=True)
  return target


def _check_arguments(
  size: int,
  train: int,
  test_good: int,
  per_defect: int,
  defects: Sequence[str],
) -> None:
  """Raises ValueError, see write_surfaces."""
  lowest = {'size': 32, 'train': 1, 'test_good': 0, 'per_defect': 0}
  given = (size, train, test_good, per_defect)
  for (name, least), value in zip(lowest.items(), given, strict=True):
    if value < least:
      raise ValueError(f'Demo set: {name} is {value}, expected >= {least}.')
  unknown = [defect for defect in defects if defect not in _DEFECTS]
  if unknown:
    raise ValueError(
      f'Demo set: unknown defects {", ".join(map(str, unknown))}, expected '
      f'kinds out of {", ".join(_DEFECTS)}.'
    )


def _is_written(target: str, parameters: dict[str, Any]) -> bool:
  """Returns whether target is the set of these parameters.

  Raises:
    DatasetError: target holds other files than a demo set.
  """
  if not os.path.lexists(target):
    return False
  try:
    with open(os.path.join(target, MARKER), encoding='utf-8') as file:
      written = json.load(file)
  except (OSError, ValueError):
    written = None
  if not isinstance(written, dict) or written.get('generator') != _GENERATOR:
    if os.path.isdir(target) and not os.listdir(target):
      return False
    raise files.DatasetError(
      f'Demo set {target}: found files without a readable {MARKER}, expected '
      'nothing or an earlier demo set. It is not overwritten: move it away, '
      'or choose another folder.'
    )
  return written == parameters


def _write_pictures(folder: str, parameters: dict[str, Any]) -> None:
  """Writes all pictures and masks, then the marker, into an empty folder."""
  size, seed = parameters['size'], parameters['seed']
  jobs: list[tuple[str, str | None, int]] = [
    ('train', None, parameters['train']),
    ('test', None, parameters['test_good']),
  ]
  for defect in parameters['defects']:
    jobs.append(('test', defect, parameters['per_defect']))
  for split, defect, count in jobs:
    kind = defect or records.GOOD
    os.makedirs(os.path.join(folder, split, kind), exist_ok=True)
    if defect:
      os.makedirs(os.path.join(folder, 'ground_truth', kind), exist_ok=True)
    for index in range(count):
      name = f'{split}/{kind}/{index:03d}'
      image, mask = surface(name, size, seed, defect)
      Image.fromarray(image).save(os.path.join(folder, f'{name}.png'))
      if defect:
        path = os.path.join('ground_truth', kind, f'{index:03d}_mask.png')
        Image.fromarray(mask * 255).save(os.path.join(folder, path))
  with open(os.path.join(folder, MARKER), 'w', encoding='utf-8') as file:
    json.dump(parameters, file, indent=2)


def _swap(building: str, target: str, parameters: dict[str, Any]) -> None:
  """Moves a complete set to its place and deletes an earlier one."""
  if _is_written(target, parameters):  # By another process, meanwhile.
    return
  earlier = f'{building}-earlier'
  try:
    if os.path.lexists(target):
      os.rename(target, earlier)
    os.rename(building, target)
  except OSError:
    # Another process may have put the same set there in between.
    if not _is_written(target, parameters):
      raise
  finally:
    shutil.rmtree(earlier, ignore_errors=True)
