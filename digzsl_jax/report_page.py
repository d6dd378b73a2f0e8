"""HTML and inline SVG of a report page: tags, tables, charts, point maps. It knows no files and no methods.

Everything that is not `Html` is escaped, so a class name may hold any character. Colours are CSS classes
and variables, so that the same page serves light and dark screens; pages are pure ASCII and load nothing.

Shapes: n point, d dimension.
"""

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfc; --panel: #f4f5f7; --ink: #1b1f24; --soft: #5a6370; --line: #d8dce1;
  --learned: #0b62c9; --plain: #b4540a; --real: #12805c; --u: #8745d8; --s: #0d7d86;
  --up: #137a41; --down: #c02626; --dot: .55;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1d2127; --ink: #e8eaed; --soft: #9ea7b3; --line: #343a43;
    --learned: #6eb1ff; --plain: #f2a25c; --real: #5ccb9f; --u: #c39bff; --s: #52c6cf;
    --up: #5fcf8c; --down: #ff8b85; --dot: .78;
  }
}
.learned { --c: var(--learned); } .plain { --c: var(--plain); } .real { --c: var(--real); }
.u { --c: var(--u); } .s { --c: var(--s); } .h { --c: var(--ink); } .other { --c: var(--soft); }
.up { color: var(--up); } .down { color: var(--down); }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.2rem 1.5rem 4rem; max-width: 1080px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 0; letter-spacing: -.01em; }
h3 { font-size: .93rem; margin: 0 0 .35rem; overflow-wrap: anywhere; }
section { margin-top: 2.6rem; }
section + header { margin-top: 4rem; }
p { margin: .3rem 0; }
figure { margin: 0; }
.soft, .guide, .note, figcaption, summary { color: var(--soft); }
.guide { max-width: 80ch; margin-bottom: 1rem; }
.note { font-size: .85rem; max-width: 115ch; margin-top: .6rem; }
.verdict { font-size: 1.08rem; max-width: 75ch; margin: .2rem 0 1.2rem; }
.alarm { border-left: 3px solid var(--down); padding: .4rem .8rem; margin-top: 1rem; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; padding: .8rem 1rem; }
.alarm, .facts, pre { background: var(--panel); }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts, pre { border-radius: 8px; }
.keys { font-size: .82rem; margin: 0 0 .5rem; }
.keys span + span { margin-left: 1.1em; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.wide { width: 100%; }
th, td { padding: .34rem .6rem; text-align: right; font-weight: 400; white-space: nowrap; }
thead th { color: var(--soft); font-size: .82rem; border-bottom: 1px solid var(--ink); }
th:first-child { text-align: left; padding-left: .4rem; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody .learned, tbody .plain { background: var(--panel); }
tbody .learned th, tbody .plain th { color: var(--c); font-weight: 600; }
tbody .learned td { font-weight: 600; }
tbody .real th { color: var(--c); }
tbody .delta, tbody .rule { border-bottom-color: var(--ink); }
tbody .oracle, tbody .published, tbody .delta th { color: var(--soft); }
tbody .oracle { font-style: italic; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, "Segoe UI", Roboto, sans-serif; }
svg .ink { fill: var(--ink); }
svg .value { fill: var(--c); font-weight: 600; }
.merged { margin-top: 1.1rem; }
.merged table { font-size: .88rem; }
.merged th { white-space: normal; }
.merged thead th { min-width: 5.2em; }
.merged tbody th { min-width: 13em; }
.merged :is(th, td) { padding: .3rem .4rem; vertical-align: bottom; }
.grid { stroke: var(--line); }
.band { fill: var(--c); opacity: .16; }
.curve { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.curve.h { stroke-width: 2.6; }
.curve.thin { stroke-width: 1.1; }
.curve.faint { opacity: .4; }
.key { background: var(--c); }
.dot, .bar { fill: var(--c); }
.mark { stroke: var(--c); stroke-width: 1.4; }
.dash { stroke-dasharray: 4 3; }
.panels { display: grid; gap: 1rem 1.4rem; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); }
.three { display: grid; gap: 1.2rem 1rem; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.three figure { align-self: end; }
.many { display: grid; gap: .9rem 1rem; grid-template-columns: repeat(auto-fill, minmax(185px, 1fr)); }
.many figure { align-self: end; }
.many h3, .many figcaption { font-size: .8rem; margin: 0; }
.pair {
  display: grid; grid-template-columns: 176px 2fr 1fr; gap: 0 16px; align-items: center; padding: .7rem 0;
  border-top: 1px solid var(--line);
}
.pair.head { padding: 0; border: 0; }
.pair table { font-size: .82rem; line-height: 1.35; }
.pair th, .pair td { padding: 0 .7em 0 0; border: 0; font-size: inherit; }
.pair th:first-child { padding-left: 0; }
.pair :is(th, td):last-child { padding-right: 0; }
.pair .scroll { overflow: visible; }
.pair tr { border: 0; }
.pair thead span { color: var(--c); }
.strip { display: grid; gap: 4px; border-left: 3px solid var(--c); padding-left: 5px; }
.strip.real { row-gap: 6px; }
.strip + .strip { margin-top: 6px; }
.strip img { width: 100%; display: block; border-radius: 2px; }
.pixels { image-rendering: pixelated; }
details { margin-top: .8rem; }
summary { cursor: pointer; margin-bottom: .6rem; }
pre { font-size: 12px; line-height: 1.4; padding: .8rem; overflow-x: auto; }
@media (max-width: 760px) {
  .pair, .panels { grid-template-columns: minmax(0, 1fr); gap: 8px; }
}
@media print { .pair, figure { break-inside: avoid; } }
"""


class Html(str):
  """Text that is markup already."""


def join(*parts: object) -> Html:
  """Parts one after the other, escaped unless `Html`; None is left out."""
  return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts if p is not None))


def tag(name: str, *children: object, **attributes: object) -> Html:
  """One element. `class_` is class, `stroke_width` is stroke-width; attributes that are None are left out."""
  pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                  for key, value in attributes.items() if value is not None)
  return Html(f"<{name}{pairs}>{join(*children)}</{name}>")


def page(title: str, *body: object, style: str = "") -> str:
  """The whole page, ASCII, so that no encoding can spoil it; `style` is CSS beside `STYLE`."""
  head = join(Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
              tag("title", title), Html(f"<style>{STYLE}{style}</style>"))
  text = "<!DOCTYPE html>\n" + tag("html", tag("head", head), tag("body", *body), lang="en") + "\n"
  return text.encode("ascii", "xmlcharrefreplace").decode()


def section(name: str, title: str, guide: str, *content: object) -> Html:
  return tag("section", tag("h2", title), tag("p", guide, class_="guide"), *content, id=name)


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
  return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


def legend(*entries: tuple[str, str]) -> Html:
  """Colour keys of (CSS class, label)."""
  keys = (tag("span", tag("i", class_=f"key {kind}"), label) for kind, label in entries)
  return tag("p", *keys, class_="keys soft")


Row = tuple[str | None, Sequence[object]]


def table(head: Sequence[object], rows: Iterable[Row], wide: bool = True) -> Html:
  """Rows of (CSS class, cells); the first column holds names, the others right-aligned numbers."""
  header = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
  body = (tag("tr", tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:]), class_=kind)
          for kind, cells in rows)
  return tag("div", tag("table", header, tag("tbody", *body), class_="wide" if wide else None),
             class_="scroll")


def known(value: object) -> bool:
  """Whether it is a finite number."""
  return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: object, digits: int = 1) -> str:
  """A value with `digits` decimals, a dash if it is not known."""
  return f"{value:.{digits}f}" if known(value) else "\u2013"


def change(new: object, old: object) -> Html | None:
  """The difference with an arrow, green for a rise; None when one is unknown."""
  if not (known(new) and known(old)):
    return None
  value = round(new - old, 1)
  if value == 0:
    return tag("span", "\u00b1 0.0", class_="soft")
  arrow, kind = ("\u25b2", "up") if value > 0 else ("\u25bc", "down")
  return tag("span", f"{arrow}\u202f{abs(value):.1f}", class_=kind)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  power = 10 ** math.floor(math.log10(rough))
  step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
  return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Axes:
  """Maps data to pixels of a plot. Ranges are (low, high); margins are left, right, top, bottom."""

  width: float
  height: float
  x_range: tuple[float, float]
  y_range: tuple[float, float]
  margins: tuple[float, float, float, float] = (34, 30, 20, 34)

  def x(self, value: float) -> float:
    """Pixels from the left edge."""
    left, right, _, _ = self.margins
    low, high = self.x_range
    return round(left + (value - low) / ((high - low) or 1) * (self.width - left - right), 1)

  def y(self, value: float) -> float:
    """Pixels from the top edge."""
    _, _, top, bottom = self.margins
    low, high = self.y_range
    return round(self.height - bottom - (value - low) / ((high - low) or 1) * (self.height - top - bottom), 1)

  def frame(self, x_label: str = "", count: int = 5, x_ticks: Sequence[tuple[float, str]] | None = None) -> Html:
    """Grid lines with their numbers and the name of the x axis; `x_ticks`, place and text, replace round numbers."""
    left, right, floor = self.margins[0], self.width - self.margins[1], self.y(self.y_range[0])
    rows = (join(tag("line", x1=left, x2=right, y1=self.y(v), y2=self.y(v), class_="grid"),
                 tag("text", f"{v:g}", x=left - 5, y=self.y(v) + 4, text_anchor="end"))
            for v in ticks(*self.y_range, count))
    if x_ticks is None:
      x_ticks = [(v, f"{v:.6g}") for v in ticks(*self.x_range, count)]
    columns = (tag("text", text, x=self.x(v), y=floor + 14, text_anchor="middle") for v, text in x_ticks)
    name = x_label and tag("text", x_label, x=(left + right) / 2, y=self.height - 4, text_anchor="middle")
    return join(*rows, *columns, name)

  def curve(self, xs: Sequence[float], ys: Sequence[object], kind: str) -> Html:
    """A polyline, interrupted where a value is missing or not finite."""
    path, pen = [], "M"
    for x, y in zip(xs, ys):
      if known(y):
        path.append(f"{pen}{self.x(x):g} {self.y(y):g}")
      pen = "L" if known(y) else "M"
    return tag("path", d=" ".join(path), class_=f"curve {kind}")

  def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], kind: str) -> Html:
    """The area between two curves, as far as it lies in the plot."""
    bottom, top = self.y_range
    edge = [*zip(xs, highs), *reversed(list(zip(xs, lows)))]
    points = " ".join(f"{self.x(x):g},{self.y(min(max(y, bottom), top)):g}" for x, y in edge)
    return tag("polygon", points=points, class_=f"band {kind}")

  def measurement(self, x: float, mean: float, deviation: float, kind: str, label: str, shift: float = 0) -> Html:
    """A dot with a stroke of one standard deviation to both sides, `shift` pixels to the right of `x`."""
    place, (bottom, top) = self.x(x) + shift, self.y_range
    low, high = (self.y(min(max(mean + sign * deviation, bottom), top)) for sign in (-1, 1))
    return tag("g", tag("title", label), tag("line", x1=place, x2=place, y1=low, y2=high, class_="mark"),
               tag("circle", cx=place, cy=self.y(mean), r=3, class_="dot"), class_=kind)

  def vertical(self, value: float, kind: str, label: str = "", lift: float = 0) -> Html:
    """A line across the plot at `value` of the x axis, its label `lift` pixels higher than just above."""
    x, top = self.x(value), self.margins[2]
    side = "start" if x < self.width * 0.3 else "end" if x > self.width * 0.7 else "middle"
    line = tag("line", x1=x, x2=x, y1=top, y2=self.y(self.y_range[0]), class_=f"mark {kind}")
    text = tag("text", label, x=x, y=top - lift - 5, text_anchor=side, class_="ink")
    return join(line, text if label else None)

  def svg(self, label: str, *parts: object) -> Html:
    return tag("svg", tag("title", label), *parts, viewBox=f"0 0 {self.width:g} {self.height:g}",
               width=f"{self.width:g}", height=f"{self.height:g}", role="img")


def spread(positions: Sequence[float], gap: float) -> list[float]:
  """Moves label positions down until they are `gap` apart, keeping their order."""
  moved, last = [0.0] * len(positions), -math.inf
  for index in sorted(range(len(positions)), key=lambda i: positions[i]):
    moved[index] = last = max(positions[index], last + gap)
  return moved


def ended_curves(axes: Axes, lines: Mapping[str, tuple[str, Sequence[float], Sequence[float]]]) -> Html:
  """A curve for each CSS class (name, xs, ys), at its end the name and its last value, none over another."""
  heights = spread([axes.y(ys[-1]) + 4 for _, _, ys in lines.values()], 13)
  return join(*(join(axes.curve(xs, ys, kind), tag("text", f"{name}{ys[-1]:.1f}", x=axes.x(xs[-1]) + 6, y=height,
                                                   class_=f"value {kind}"))
                for (kind, (name, xs, ys)), height in zip(lines.items(), heights)))


def bars(rows: Sequence[tuple[str, Sequence[object]]], series: Sequence[tuple[str, str]], limit: float,
         label: str, bounds: Sequence[object] = (), digits: int = 0) -> Html:
  """Horizontal bars, one group a row, from 0 to `limit`.

  Args:
    rows: (name, a value for each series).
    series: (CSS class, name) of each bar of a group.
    bounds: a value for each row, drawn as a stroke beside its group.
  """
  wide = min(270, 14 + 6.4 * max(len(name) for name, _ in rows))
  thick = 10
  height = len(series) * thick + 8
  axes = Axes(1000, len(rows) * height + 4, (0, limit), (0, 1), (wide, 56, 0, 0))
  parts = [tag("line", x1=wide, x2=wide, y1=0, y2=axes.height, class_="grid")]
  for index, (name, values) in enumerate(rows):
    top = index * height + 4
    short = name if len(name) <= 40 else name[:39] + "\u2026"
    middle = top + len(series) * thick / 2
    parts.append(tag("text", short, x=wide - 8, y=middle + 4, text_anchor="end", class_="ink"))
    for y, (kind, what), value in zip(range(top, top + height, thick), series, values):
      if known(value):
        parts += (tag("rect", tag("title", f"{name}, {what}: {number(value)}"), x=wide, y=y, height=thick - 1,
                      width=max(axes.x(value) - wide, 0.5), class_=f"bar {kind}"),
                  tag("text", number(value, digits), x=axes.x(value) + 4, y=y + thick - 1.5,
                      class_=f"value {kind}"))
  for index, value in enumerate(bounds):
    if known(value):
      x, top = axes.x(value), index * height + 2
      parts.append(tag("line", x1=x, x2=x, y1=top, y2=top + height - 3, class_="mark real"))
  return axes.svg(label, *parts)


def scatter(points: Sequence[tuple[float, float, str, str]], label: str) -> Html:
  """Named points without axes, a hue each.

  Args:
    points: (x, y, name, marker); the marker is "dot", "ring" or "cross". A cross has no hue.
  """
  xs, ys = [p[0] for p in points], [p[1] for p in points]
  axes = Axes(1000, 470, (min(xs), max(xs)), (min(ys), max(ys)), (130, 130, 22, 22))
  taken = [(axes.x(x) - 6, axes.y(y) - 6, axes.x(x) + 6, axes.y(y) + 6) for x, y, _, _ in points]
  parts = []
  for index, (x, y, name, marker) in enumerate(points):
    px, py = axes.x(x), axes.y(y)
    if marker == "cross":
      shape, hue = tag("path", d=f"M{px - 6} {py - 6}l12 12m0 -12l-12 12", class_="curve h"), None
    else:
      shape = tag("circle", cx=px, cy=py, r=5.5, class_="dot" if marker == "dot" else "curve")
      hue = f"--c: oklch(var(--dot) .15 {360 * index / len(points):.0f})"
    parts.append(tag("g", tag("title", name), shape, style=hue, class_=None if hue else "h"))
    place = free_place(px, py, name, taken[:index] + taken[index + 1:], axes.width)
    if place is not None:
      box, text = place
      taken.append(box)
      parts.append(text)
  return axes.svg(label, *parts)


Box = tuple[float, float, float, float]


def free_place(x: float, y: float, name: str, taken: Sequence[Box], width: float) -> tuple[Box, Html] | None:
  """First place beside a point where its label covers nothing; None where hovering has to name the point."""
  long = 6.1 * len(name)
  for anchor, dx, dy in (("start", 9, 4), ("end", -9, 4), ("middle", 0, -10), ("middle", 0, 18),
                         ("start", 7, -7), ("start", 7, 15), ("end", -7, -7), ("end", -7, 15)):
    left = x + dx - {"start": 0, "middle": long / 2, "end": long}[anchor]
    box = (left, y + dy - 10, left + long, y + dy + 2)
    free = all(box[0] >= t[2] or t[0] >= box[2] or box[1] >= t[3] or t[1] >= box[3] for t in taken)
    if free and left >= 0 and box[2] <= width:
      return box, tag("text", name, x=x + dx, y=y + dy, text_anchor=anchor, class_="ink")
  return None


def tsne(points_nd: np.ndarray, perplexity: float, steps: int = 1000) -> np.ndarray:
  """Exact t-SNE (van der Maaten & Hinton, JMLR 2008), deterministic: it starts from two principal components.

  Written here because the alternative, scikit-learn, would be a large run-time dependency for one picture.

  Returns:
    Positions `[n, 2]`; all zero where the points do not differ.
  """
  centred_nd = points_nd - points_nd.mean(0)
  norms_n = (centred_nd**2).sum(1)
  squared_nn = np.maximum(norms_n[:, None] + norms_n - 2 * centred_nd @ centred_nd.T, 0)
  left, scale, _ = np.linalg.svd(centred_nd, full_matrices=False)
  if scale[0] < 1e-9:
    return np.zeros((len(points_nd), 2))
  y_n2 = 1e-4 * left[:, :2] * scale[:2] / (left[:, 0] * scale[0]).std()
  p_nn = affinities(squared_nn / squared_nn.mean(), perplexity)
  velocity, gains, rate = np.zeros_like(y_n2), np.ones_like(y_n2), max(len(y_n2) / 4, 10.0)
  for step in range(steps):
    # Early exaggeration and low momentum let clusters form before they settle (section 3.4).
    exaggeration, momentum = (4.0, 0.5) if step < steps // 4 else (1.0, 0.8)
    kernel_nn = 1 / (1 + ((y_n2[:, None] - y_n2[None])**2).sum(-1))
    np.fill_diagonal(kernel_nn, 0)
    pull_nn = (exaggeration * p_nn - kernel_nn / kernel_nn.sum()) * kernel_nn
    grad_n2 = 4 * (pull_nn.sum(1)[:, None] * y_n2 - pull_nn @ y_n2)  # equation 5
    gains = np.maximum(np.where(np.sign(grad_n2) == np.sign(velocity), gains * 0.8, gains + 0.2), 0.01)
    velocity = momentum * velocity - rate * gains * grad_n2
    y_n2 = y_n2 + velocity - (y_n2 + velocity).mean(0)
  return y_n2


def affinities(squared_nn: np.ndarray, perplexity: float) -> np.ndarray:
  """Symmetric joint probabilities (equation 1); each row's width is bisected to reach `perplexity`."""
  n = len(squared_nn)
  others_nn = np.where(np.eye(n, dtype=bool), np.inf, squared_nn)
  others_nn = others_nn - others_nn.min(1, keepdims=True)  # the nearest at 0: no row underflows
  low_n1, high_n1 = np.full((n, 1), -30.0), np.full((n, 1), 30.0)
  for _ in range(60):
    middle_n1 = (low_n1 + high_n1) / 2
    p_nn = np.exp(-np.exp(middle_n1) * others_nn)
    p_nn /= p_nn.sum(1, keepdims=True)
    entropy_n1 = -(p_nn * np.log(np.maximum(p_nn, 1e-300))).sum(1, keepdims=True)
    wide = entropy_n1 > np.log(perplexity)
    low_n1, high_n1 = np.where(wide, middle_n1, low_n1), np.where(wide, high_n1, middle_n1)
  return np.maximum((p_nn + p_nn.T) / (2 * n), 1e-12)
