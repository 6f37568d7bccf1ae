"""The suite `coverage`: how often a 95 % interval holds the true value.

Test sets are drawn from populations whose figures are known from one very large
set with the same share of defective images. Ours stand beside the percentiles
of a bootstrap over the images and, for the AUROC of images, DeLong's normal
interval.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools

import numpy as np
from scipy import stats

from dmdd_jax.benchmark import measure
from dmdd_jax.metrics import region
from dmdd_jax.metrics import results
from dmdd_jax.metrics import tallies

# Good and defective images of a test set.
SIZES = ((20, 20), (20, 63), (30, 30), (60, 20))
_DRAWS = 200
_LARGE = 16_000
# Sets of a repeat; those of scores alone take a tenth of the time.
_SETS = {'scores': 500, 'maps': 100}
_SIDE = 12
_IMAGE = ('image_auroc', 'image_ap')
_PIXEL = (
  *('pixel_auroc', 'pixel_ap', 'pixel_f1_max', 'au_pro', 'au_pro_005'),
  'pro_per_image',
)

# (maps or None, masks or None, scores, labels)
TestSet = tuple[np.ndarray | None, np.ndarray | None, np.ndarray, np.ndarray]
Ends = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Coverage:
  """What the intervals of one figure of one population did.

  Attributes:
    population: its name.
    metric: the figure.
    good: good images of a test set.
    defective: defective images of a test set.
    truth: the figure of the population.
    covered: {method: share of the test sets whose interval holds the truth}.
    width: {method: mean width of the interval}.
    without: share of the test sets that have no interval of ours.
  """

  population: str
  metric: str
  good: int
  defective: int
  truth: float
  covered: dict[str, float]
  width: dict[str, float]
  without: float


def binormal(
  rng: np.random.Generator, good: int, defective: int, gap: float, spread: float
) -> TestSet:
  """Normal scores; those of defects `gap` higher, `spread` times as wide."""
  scores = rng.normal(size=good + defective)
  scores[good:] = gap + spread * scores[good:]
  return None, None, scores, np.repeat([0, 1], [good, defective])


def surfaces(
  rng: np.random.Generator, good: int, defective: int, gap: float, spread: float
) -> TestSet:
  """Noise at a level of each image's own, and a rectangle raised in it.

  The rectangle is raised by an amount of its own, of mean `gap` and deviation
  `spread`; pixels of an image rise and fall together.
  """
  count = good + defective
  labels = np.repeat([0, 1], [good, defective])
  maps = rng.standard_normal((count, _SIDE, _SIDE), np.float32)
  maps += 0.4 * rng.standard_normal((count, 1, 1), np.float32)
  rows, columns = np.arange(_SIDE)[:, None], np.arange(_SIDE)
  corner = rng.integers(0, _SIDE - 4, (2, count, 1, 1))
  sides = rng.integers(1, 5, (2, count, 1, 1))
  across = (corner[0] <= rows) & (rows < corner[0] + sides[0])
  along = (corner[1] <= columns) & (columns < corner[1] + sides[1])
  inside = across & along
  masks = (inside & (labels == 1)[:, None, None]).astype(np.uint8)
  maps += masks * (gap + spread * rng.normal(size=(count, 1, 1)))
  return maps.astype(np.float32), masks, maps.max(axis=(1, 2)), labels


POPULATIONS: dict[str, Callable[..., TestSet]] = {
  'scores, equal spread, 2.5 apart': functools.partial(
    binormal, gap=2.5, spread=1
  ),
  'scores, equal spread, 3.5 apart': functools.partial(
    binormal, gap=3.5, spread=1
  ),
  'scores, defects twice as wide, 3.95 apart': functools.partial(
    binormal, gap=3.95, spread=2
  ),
  'maps, defects raised by 4 +- 0.5': functools.partial(
    surfaces, gap=4, spread=0.5
  ),
  'maps, defects raised by 2.2 +- 1': functools.partial(
    surfaces, gap=2.2, spread=1
  ),
}


def run(options: measure.Options) -> list[Coverage]:
  """Coverage and width; a repeat is 500 sets of scores and 100 of maps."""
  return [
    row
    for name, population in POPULATIONS.items()
    for good, defective in SIZES
    for row in _cover(
      name,
      population,
      good,
      defective,
      options.repeats * _SETS[name.split(',')[0]],
    )
  ]


def _cover(
  name: str,
  population: Callable[..., TestSet],
  good: int,
  defective: int,
  sets: int,
) -> Iterator[Coverage]:
  """The rows of one population and size."""
  rng = np.random.default_rng(0)
  count = _LARGE // (good + defective)
  large = population(rng, good * count, defective * count)
  names = _IMAGE if large[0] is None else _PIXEL
  truth = _figures(large, intervals=False)
  spans: dict[str, list[dict[str, Ends]]] = {metric: [] for metric in names}
  for seed in range(sets):
    case = population(rng, good, defective)
    ours = _figures(case)['confidence']
    drawn = bootstrap(case, seed)
    for metric in names:
      ends = {'bootstrap': drawn[metric]}
      if ours[metric] is not None:
        ends['ours'] = tuple(ours[metric])
      if metric == 'image_auroc':
        ends['DeLong'] = delong(*case[2:])
      spans[metric].append(ends)
  for metric in names:
    methods = dict.fromkeys(m for ends in spans[metric] for m in ends)
    of = {m: [e[m] for e in spans[metric] if m in e] for m in methods}
    yield Coverage(
      name,
      metric,
      good,
      defective,
      truth[metric],
      {m: _share(ends, truth[metric]) for m, ends in of.items()},
      {m: float(np.mean(np.diff(ends, axis=1))) for m, ends in of.items()},
      1 - len(of.get('ours', ())) / sets,
    )


def _share(ends: Sequence[Ends], truth: float) -> float:
  """The share of the intervals that hold the truth."""
  return float(np.mean([low <= truth <= high for low, high in ends]))


def _figures(case: TestSet, intervals: bool = True) -> dict:
  return results.compute(
    *case,
    extra=() if case[0] is None else ('pro_per_image',),
    intervals=intervals,
  )


def bootstrap(case: TestSet, seed: int) -> dict[str, Ends]:
  """{metric: the 2.5 and 97.5 % percentiles over 200 draws of the images}.

  Good and defective images are drawn separately, with replacement.
  """
  maps, masks, scores, labels = case
  rng = np.random.default_rng(seed)
  weights = np.zeros((_DRAWS, len(labels)))
  for label in (0, 1):
    images = np.flatnonzero(labels == label)
    share = np.full(len(images), 1 / len(images))
    weights[:, images] = rng.multinomial(len(images), share, size=_DRAWS)
  group = np.arange(len(labels))
  if maps is None:
    counts = tallies.tally_scores(scores, labels, group)
    ranked = tallies.measure_ranking(tallies.weighted(counts, weights))
    drawn = {f'image_{name}': values for name, values in ranked.items()}
  else:
    pixels = region.prepare(maps, masks)
    counts = tallies.tally_pixels(pixels, labels == 0, group)
    counts = tallies.weighted(counts, weights)
    ranked = tallies.measure_ranking(counts)
    drawn = {f'pixel_{name}': values for name, values in ranked.items()}
    pros, _ = tallies.measure_regions(counts, (0.3, 0.05))
    drawn['au_pro'], drawn['au_pro_005'] = pros
    each = np.nan_to_num(region.pro_per_image(pixels))
    drawn['pro_per_image'] = weights @ each / counts.defective
  return {
    name: tuple(np.percentile(values, [2.5, 97.5]))
    for name, values in drawn.items()
  }


def delong(scores: np.ndarray, labels: np.ndarray) -> Ends:
  """The AUROC plus and minus 1.96 of DeLong's standard errors, in [0, 1]."""
  bad, good = scores[labels == 1], scores[labels == 0]
  won = (bad[:, None] > good) + 0.5 * (bad[:, None] == good)
  variance = sum(
    np.var(won.mean(axis=axis), ddof=1) / won.shape[1 - axis] for axis in (0, 1)
  )
  half = stats.norm.ppf(0.975) * np.sqrt(variance)
  return max(0.0, won.mean() - half), min(1.0, won.mean() + half)


def format_table(rows: Sequence[Coverage]) -> str:
  """A Markdown table: coverage and, in brackets, the mean width."""
  methods = ('ours', 'bootstrap', 'DeLong')
  lines = [
    '| population | figure | true | good + defective | '
    + ' | '.join(methods)
    + ' | without |',
    '|---|---|---:|---:|' + '---:|' * (len(methods) + 1),
  ]
  for row in rows:
    cells = [row.population, row.metric, f'{row.truth:.4f}']
    cells.append(f'{row.good} + {row.defective}')
    cells += [
      f'{row.covered[m]:.3f} ({row.width[m]:.3f})' if m in row.covered else ''
      for m in methods
    ]
    cells.append(f'{row.without:.3f}' if row.without else '')
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'
