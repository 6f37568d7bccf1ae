"""Charts as inline SVG that follow the page's colours; no library, no script.

Synopsis:

  svg = report_charts.lines(
    'ROC', [report_charts.Line('image', x, y)], x_label='false-positive rate'
  )

Every text is escaped. Colours are the classes s1 to s6 of the page's style
sheet, lines differ in their dashes too.
"""

from collections.abc import Sequence
import dataclasses
import html
import math

import numpy as np

_WIDTH, _HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 10, 38
_COLORS = 6


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a chart: its name, and (K,) x and y."""

  name: str
  x: Sequence[float]
  y: Sequence[float]


@dataclasses.dataclass(frozen=True)
class _Axis:
  """Maps values to pixels, linearly or by the logarithm."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def __call__(self, values):
    values = np.asarray(values, np.float64)
    low, high = self.low, self.high
    if self.log:
      values, low, high = np.log10(values), math.log10(low), math.log10(high)
    share = (values - low) / (high - low)
    return self.start + share * (self.end - self.start)

  def ticks(self) -> list[float]:
    """Round values within the ends."""
    if self.log:
      first, last = math.log10(self.low), math.log10(self.high)
      powers = range(math.ceil(first), math.floor(last) + 1)
      marks = (1,) if len(powers) > 3 else (1, 2, 5)
      every = range(math.floor(first), math.ceil(last) + 1)
      found = [m * 10.0**p for p in every for m in marks]
      return [t for t in found if self.low <= t <= self.high]
    step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
    while (self.high - self.low) / step > 6:
      step *= 2.5 if f'{step:e}'[0] == '2' else 2
    first = math.ceil(self.low / step - 1e-9)
    last = math.floor(self.high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def lines(
  title: str,
  drawn: Sequence[Line],
  *,
  x_label: str,
  y_label: str,
  x_range: tuple[float, float] | None = None,
  y_range: tuple[float, float] | None = None,
  log: bool = False,
  diagonal: bool = False,
) -> str:
  """A figure with one or more lines and their legend.

  Args:
    title: of the figure.
    drawn: lines with at least one point each.
    x_label: of the axis.
    y_label: of the axis.
    x_range: ends of the axis; those of the data.
    y_range: likewise.
    log: y by its logarithm; values that are not positive are left out.
    diagonal: whether to draw what chance would give.
  """
  if log:
    drawn = [
      Line(one.name, np.asarray(one.x)[keep], np.asarray(one.y)[keep])
      for one in drawn
      if (keep := np.asarray(one.y) > 0).any()
    ]
  x_axis = _Axis(
    *(x_range or _ends([one.x for one in drawn])), _LEFT, _WIDTH - _RIGHT
  )
  y_axis = _Axis(
    *(y_range or _ends([one.y for one in drawn])),
    _HEIGHT - _BOTTOM,
    _TOP,
    log,
  )
  parts = [_frame(x_axis, y_axis, x_label, y_label)]
  if diagonal:
    parts.append(
      _path([x_axis(0), x_axis(1)], [y_axis(0), y_axis(1)], 'chance')
    )
  for index, one in enumerate(drawn):
    path = _clipped(x_axis, y_axis, one)
    parts.append(_path(*path, f'line {_color(index)}'))
    if len(one.x) == 1:
      parts.append(
        f'<circle class="dot {_color(index)}" cx="{path[0][0]:.1f}"'
        f' cy="{path[1][0]:.1f}" r="3"/>'
      )
  legend = [(_color(i), one.name) for i, one in enumerate(drawn)]
  return _figure(title, ''.join(parts), legend)


def histogram(
  title: str,
  groups: Sequence[tuple[str, Sequence[float]]],
  *,
  x_label: str,
  threshold: float,
  bins: int = 24,
) -> str:
  """A figure with the counts of up to two groups and a threshold.

  Args:
    title: of the figure.
    groups: names and values; not all empty.
    x_label: of the axis.
    threshold: a vertical line, none where it is NaN.
    bins: number of them.
  """
  values = np.concatenate([np.asarray(v, np.float64) for _, v in groups])
  known = values if math.isnan(threshold) else np.append(values, threshold)
  low, high = _ends([known], margin=0.03)
  edges = np.linspace(low, high, bins + 1)
  counts = [np.histogram(v, edges)[0] for _, v in groups]
  top = max(1, int(np.max(counts)))
  x_axis = _Axis(low, high, _LEFT, _WIDTH - _RIGHT)
  y_axis = _Axis(0, top * 1.08, _HEIGHT - _BOTTOM, _TOP)
  parts = [_frame(x_axis, y_axis, x_label, 'images')]
  left, right = x_axis(edges[:-1]), x_axis(edges[1:])
  width = (right - left) / len(groups)
  for index, count in enumerate(counts):
    for x, step, n in zip(left + index * width, width, count):
      if n:
        y = float(y_axis(n))
        parts.append(
          f'<rect class="bar {_color(index)}" x="{x:.1f}" y="{y:.1f}"'
          f' width="{step - 0.6:.1f}" height="{_HEIGHT - _BOTTOM - y:.1f}"/>'
        )
  legend = [(_color(i), f'{n} ({len(v)})') for i, (n, v) in enumerate(groups)]
  if not math.isnan(threshold):
    x = float(x_axis(threshold))
    parts.append(
      f'<path class="threshold" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
    )
    legend.append(('threshold', f'threshold {threshold:.3g}'))
  return _figure(title, ''.join(parts), legend)


def _ends(
  values: Sequence[Sequence[float]], margin: float = 0.0
) -> tuple[float, float]:
  """Lowest and highest of all values, apart in any case."""
  flat = np.concatenate([np.asarray(v, np.float64) for v in values])
  low, high = float(flat.min()), float(flat.max())
  if high - low <= 1e-9 * max(1.0, abs(high)):
    low, high = low - abs(low) * 0.1 - 1e-6, high + abs(high) * 0.1 + 1e-6
  return low - margin * (high - low), high + margin * (high - low)


def _clipped(x_axis: _Axis, y_axis: _Axis, line: Line):
  """A line's pixels, cut where it leaves the axis of x on the right."""
  x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
  if len(x) and x[-1] > x_axis.high:
    end = np.interp(x_axis.high, x, y)
    inside = x <= x_axis.high
    x, y = np.append(x[inside], x_axis.high), np.append(y[inside], end)
  return x_axis(x), y_axis(y)


def _path(x: Sequence[float], y: Sequence[float], kind: str) -> str:
  points = ' '.join(f'{a:.1f} {b:.1f}' for a, b in zip(x, y))
  return f'<path class="{kind}" d="M{points}"/>'


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
  """Grid, ticks and labels."""
  bottom, parts = _HEIGHT - _BOTTOM, []
  for tick in y_axis.ticks():
    y = float(y_axis(tick))
    parts.append(
      f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
      f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" class="end">{tick:.4g}</text>'
    )
  for tick in x_axis.ticks():
    x = float(x_axis(tick))
    parts.append(
      f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
      f'<text x="{x:.1f}" y="{bottom + 15}" class="middle">{tick:.4g}</text>'
    )
  parts.append(
    f'<path class="axis" d="M{_LEFT} {bottom}H{_WIDTH - _RIGHT}"/>'
    f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}"'
    f' class="middle label">{html.escape(x_label)}</text>'
    f'<text transform="translate(11 {(_TOP + bottom) / 2}) rotate(-90)"'
    f' class="middle label">{html.escape(y_label)}</text>'
  )
  return ''.join(parts)


def _figure(title: str, body: str, legend: Sequence[tuple[str, str]]) -> str:
  """The chart with its title and legend around it."""
  keys = ''.join(
    f'<li><svg viewBox="0 0 22 8" aria-hidden="true">'
    f'<path class="line {kind}" d="M1 4H21"/></svg>{html.escape(name)}</li>'
    for kind, name in legend
  )
  names = '; '.join(name for _, name in legend)
  label = html.escape(f'{title}: {names}', quote=True)
  return (
    f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>'
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    f'{body}</svg><ul class="legend">{keys}</ul></figure>'
  )


def _color(index: int) -> str:
  return f's{index % _COLORS + 1}'
