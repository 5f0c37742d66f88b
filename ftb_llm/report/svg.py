"""Charts as inline SVG. Colours are CSS classes, so that the page's palette (light or dark) applies to them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ftb_llm.report.files import Point, thin

LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 18.0, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve. `look` is one or more of the CSS classes `faint`, `dashed`; `band` is how far off each point may be."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    look: str = ""
    dots: bool = False
    band: Sequence[Point] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A vertical line at a step, such as a change of the divergence."""

    step: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Values to pixels, linearly or in decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high, count)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = -(-(last - first + 1) // count)
        return [10.0**exponent for exponent in range(first, last + 1, every)] if last > first else [self.low, self.high]


def line_chart(
    title: str, series: Iterable[Series], *, marks: Sequence[Mark] = (), width: float = 520, height: float = 230, unit: str = "", from_zero: bool = False
) -> str:
    """A figure with curves over steps; says so when there is nothing to draw."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return figure(title, "", '<p class="missing">Not recorded in this run.</p>')
    steps = [step for one in drawn for step, _ in one.points]
    values = [value for one in drawn for _, value in one.points]
    x = Axis(low=min(steps), high=max(max(steps), min(steps) + 1), start=LEFT, end=width - RIGHT)
    y = value_axis(values, top=TOP, bottom=height - BOTTOM, from_zero=from_zero)
    parts = [*_grid(x, y, width, height), *_marks(marks, x, height)]
    parts += [_band(one, x, y) for one in drawn if one.band]
    parts += [_curve(one, x, y) for one in drawn]
    legend = _legend(drawn) if len(drawn) > 1 else ""
    summary = "; ".join(f"{one.label} from {tick_text(one.points[0][1])} to {tick_text(one.points[-1][1])}" for one in drawn)
    return figure(title, legend, _svg(width, height, f"{title}: {summary}", parts), unit=f"{unit}{', log scale' if y.log else ''}".removeprefix(", "))


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, x_label: str, y_label: str, width: float = 520, height: float = 230) -> str:
    """A figure with one bar per (label, count)."""
    if not bars:
        return figure(title, "", '<p class="missing">Not recorded in this run.</p>')
    y = Axis(low=0.0, high=max(count for _, count in bars) * 1.05 or 1.0, start=height - BOTTOM - 12, end=TOP)
    slot = (width - LEFT - RIGHT) / len(bars)
    label_every = -(-len(bars) // max(1, int((width - LEFT - RIGHT) / 42)))
    parts = [_y_tick(tick, y, width) for tick in y.ticks(4)]
    for index, (label, count) in enumerate(bars):
        left, top = LEFT + index * slot, y.place(count)
        parts.append(
            f'<rect class="bar" x="{left + slot * 0.1:.1f}" y="{top:.1f}" width="{slot * 0.8:.1f}" height="{y.start - top:.1f}">'
            f"<title>{escape(label)}: {count:g}</title></rect>"
        )
        if index % label_every == 0:
            parts.append(f'<text class="tick" x="{left + slot / 2:.1f}" y="{height - BOTTOM + 4:.1f}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<text class="tick" x="{(LEFT + width - RIGHT) / 2:.1f}" y="{height - 6:.1f}" text-anchor="middle">{escape(x_label)}</text>')
    return figure(title, "", _svg(width, height, f"{title}: {len(bars)} bars", parts), unit=y_label)


def figure(title: str, legend: str, body: str, *, unit: str = "") -> str:
    aside = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return f"<figure><figcaption>{escape(title)}{aside}</figcaption>{legend}{body}</figure>"


def value_axis(values: Sequence[float], *, top: float, bottom: float, from_zero: bool) -> Axis:
    """Linear, or in decades where positive values span more than two of them."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 100 and not from_zero:
        return Axis(low=low, high=high, start=bottom, end=top, log=True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low=low if from_zero and low == 0 else low - pad, high=high + pad, start=bottom, end=top)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) within the range, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.0e}" if value else "0"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img"><title>{escape(title)}</title>{"".join(parts)}</svg>'


def _grid(x: Axis, y: Axis, width: float, height: float) -> list[str]:
    parts = [_y_tick(tick, y, width) for tick in y.ticks(4 if height < 200 else 5)]
    for tick in x.ticks(4 if width < 500 else 8):
        parts.append(f'<text class="tick" x="{x.place(tick):.1f}" y="{height - BOTTOM + 16:.1f}" text-anchor="middle">{tick_text(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{width - RIGHT:g}" y1="{height - BOTTOM:g}" y2="{height - BOTTOM:g}"/>')
    return parts


def _y_tick(tick: float, y: Axis, width: float) -> str:
    at = y.place(tick)
    line = f'<line class="grid" x1="{LEFT:g}" x2="{width - RIGHT:g}" y1="{at:.1f}" y2="{at:.1f}"/>'
    return f'{line}<text class="tick" x="{LEFT - 7:g}" y="{at + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>'


def _marks(marks: Sequence[Mark], x: Axis, height: float) -> list[str]:
    parts = []
    for mark in marks:
        if x.low <= mark.step <= x.high:
            at = x.place(mark.step)
            end = at > (x.start + x.end) / 2 and at > x.end - 90  # no room to the right
            parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6:g}" y2="{height - BOTTOM:g}"/>')
            parts.append(f'<text class="mark-label" x="{at + (-4 if end else 4):.1f}" y="{TOP - 2:g}"{_anchor_end(end)}>{escape(mark.label)}</text>')
    return parts


def _anchor_end(end: bool) -> str:
    return ' text-anchor="end"' if end else ""


def _curve(one: Series, x: Axis, y: Axis) -> str:
    points = one.points if one.dots else thin(one.points)
    placed = [(x.place(step), y.place(value)) for step, value in points]
    path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in placed)
    parts = [f'<path class="line c{one.colour} {one.look}" d="{path}"/>']
    if one.dots or len(placed) == 1:
        for (left, top), (step, value) in zip(placed, points, strict=True):
            parts.append(f'<circle class="dot c{one.colour}" cx="{left:.1f}" cy="{top:.1f}" r="2.6"><title>step {step:g}: {value:.5g}</title></circle>')
    return "".join(parts)


def _band(one: Series, x: Axis, y: Axis) -> str:
    """The area within `band` of the curve, as far as the axis goes: a wild error bar must not flatten the curves."""
    middle, width = thin(one.points), [value for _, value in thin(one.band)]
    edges = [[(step, min(max(value + sign * off, y.low), y.high)) for (step, value), off in zip(middle, width, strict=True)] for sign in (1, -1)]
    path = "M" + "L".join(f"{x.place(step):.1f} {y.place(value):.1f}" for step, value in (*edges[0], *reversed(edges[1]))) + "Z"
    return f'<path class="band b{one.colour}" d="{path}"/>'


def _legend(series: Sequence[Series]) -> str:
    keys = "".join(f'<span class="key"><i class="swatch b{one.colour} {one.look}"></i>{escape(one.label)}</span>' for one in series)
    return f'<div class="legend">{keys}</div>'
