"""Charts as inline SVG that follow the page's colours; no script.

Synopsis:

  svg = charts.lines(
    'ROC',
    [charts.Line('image', x, y)],
    x_label='false-positive rate',
    y_label='true-positive rate',
  )

A chart is a `markupsafe.Markup`, whose `format` escapes every text. Colours are
the classes s1 to s6 of the page's style sheet; lines differ in their dashes
too.
"""

from collections.abc import Sequence
import dataclasses
import math

import markupsafe
from matplotlib import ticker
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

  def __call__(self, values: Sequence[float] | float) -> np.ndarray:
    values = np.asarray(values, np.float64)
    low, high = self.low, self.high
    if self.log:
      values, low, high = np.log10(values), math.log10(low), math.log10(high)
    share = (values - low) / (high - low)
    return self.start + share * (self.end - self.start)

  def ticks(self) -> list[float]:
    """Round values within the ends."""
    if self.log:
      wide = self.high / self.low >= 1000
      locator = ticker.LogLocator(subs=(1,) if wide else (1, 2, 5))
      values = locator.tick_values(self.low, self.high)
    else:
      locator = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
      values = locator.tick_values(self.low, self.high)
      # Zero can come as 1e-17, which would be its label.
      values[np.abs(values) < 1e-9 * (self.high - self.low)] = 0.0
    low = self.low - 1e-9 * abs(self.low)
    high = self.high + 1e-9 * abs(self.high)
    return values[(values >= low) & (values <= high)].tolist()


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
) -> markupsafe.Markup:
  """A figure with one or more lines and their legend.

  Args:
    title: of the figure.
    drawn: lines, each with at least one point.
    x_label: of the axis.
    y_label: of the axis.
    x_range: ends of the axis; by default those of the data.
    y_range: likewise.
    log: y by its logarithm; values that are not positive are not drawn.
    diagonal: whether to draw the diagonal, the ROC curve of chance.
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
        _element(
          '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>',
          _color(index),
          path[0][0],
          path[1][0],
        )
      )
  legend = [(_color(i), one.name) for i, one in enumerate(drawn)]
  return _figure(title, parts, legend)


def histogram(
  title: str,
  groups: Sequence[tuple[str, Sequence[float]]],
  *,
  x_label: str,
  threshold: float,
  bins: int = 24,
) -> markupsafe.Markup:
  """A figure with the counts of up to two groups and a threshold.

  Args:
    title: of the figure.
    groups: names and values; not all empty.
    x_label: of the axis.
    threshold: drawn as a vertical line; NaN draws none.
    bins: how many bars a group has.
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
          _element(
            '<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}"'
            ' height="{:.1f}"/>',
            _color(index),
            x,
            y,
            step - 0.6,
            _HEIGHT - _BOTTOM - y,
          )
        )
  legend = [(_color(i), f'{n} ({len(v)})') for i, (n, v) in enumerate(groups)]
  if not math.isnan(threshold):
    x = float(x_axis(threshold))
    parts.append(
      _element(
        '<path class="threshold" d="M{:.1f} {}V{}"/>',
        x,
        _TOP,
        _HEIGHT - _BOTTOM,
      )
    )
    legend.append(('threshold', f'threshold {threshold:.3g}'))
  return _figure(title, parts, legend)


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


def _element(
  template: str, *values: str | float, **named: str | float
) -> markupsafe.Markup:
  """The template with its values, escaped where they are not Markup."""
  return markupsafe.Markup(template).format(*values, **named)


def _path(
  x: Sequence[float], y: Sequence[float], kind: str
) -> markupsafe.Markup:
  points = ' '.join(f'{a:.1f} {b:.1f}' for a, b in zip(x, y))
  return _element('<path class="{}" d="M{}"/>', kind, points)


def _frame(
  x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str
) -> markupsafe.Markup:
  """Grid, ticks and labels."""
  bottom, right, parts = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, []
  for tick in y_axis.ticks():
    y = float(y_axis(tick))
    parts += [
      _element('<path class="grid" d="M{} {:.1f}H{}"/>', _LEFT, y, right),
      _text('x="{}" y="{:.1f}" class="end"', f'{tick:.4g}', _LEFT - 6, y + 3.5),
    ]
  for tick in x_axis.ticks():
    x = float(x_axis(tick))
    parts += [
      _element('<path class="axis" d="M{:.1f} {}v4"/>', x, bottom),
      _text('x="{:.1f}" y="{}" class="middle"', f'{tick:.4g}', x, bottom + 15),
    ]
  middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
  parts += [
    _element('<path class="axis" d="M{} {}H{}"/>', _LEFT, bottom, right),
    _text('x="{}" y="{}" class="middle label"', x_label, middle_x, _HEIGHT - 6),
    _text(
      'transform="translate(11 {}) rotate(-90)" class="middle label"',
      y_label,
      middle_y,
    ),
  ]
  return markupsafe.Markup().join(parts)


def _text(attributes: str, text: str, *values: float) -> markupsafe.Markup:
  return _element(f'<text {attributes}>{{}}</text>', *values, text)


def _figure(
  title: str,
  parts: Sequence[markupsafe.Markup],
  legend: Sequence[tuple[str, str]],
) -> markupsafe.Markup:
  """The chart with its title and legend around it."""
  keys = [
    _element(
      '<li><svg viewBox="0 0 22 8" aria-hidden="true">'
      '<path class="line {}" d="M1 4H21"/></svg>{}</li>',
      kind,
      name,
    )
    for kind, name in legend
  ]
  names = '; '.join(name for _, name in legend)
  return _element(
    '<figure class="chart"><figcaption>{title}</figcaption>'
    '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    '{body}</svg><ul class="legend">{keys}</ul></figure>',
    title=title,
    width=_WIDTH,
    height=_HEIGHT,
    label=f'{title}: {names}',
    body=markupsafe.Markup().join(parts),
    keys=markupsafe.Markup().join(keys),
  )


def _color(index: int) -> str:
  return f's{index % _COLORS + 1}'
