"""Small multiples as one SVG file of its own: white ground, its own style, shown alike on light and dark pages."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ftb_llm.report.svg import Axis, nice_ticks, tick_text

PANEL_WIDTH, PANEL_HEIGHT = 430.0, 235.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 16.0, 34.0, 44.0
LEGEND_COLUMN, LEGEND_ROW = 150.0, 20.0
SMALLEST = 1e-6  # on a logarithmic axis

# Members of the family are solid, baselines dashed. Every known name keeps its colour from one picture to the next.
COLOURS = {
    "reverse_kl": "#1f77b4",
    "forward_kl": "#ff7f0e",
    "hellinger": "#2ca02c",
    "js": "#9467bd",
    "tv": "#8c564b",
    "pearson": "#d62728",
    "neyman": "#e377c2",
    "alpha": "#17becf",
    "ppo_clip": "#111111",
    "grpo": "#8a8a8a",
    "reinforce": "#a5a500",
    "importance": "#393b79",
}
DASHED = ("ppo_clip", "grpo", "reinforce", "importance")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600}.tick{fill:#555;font-size:11px}"
    ".grid{stroke:#e4e4e4}.axis{stroke:#888}.line,.bar{fill:none;stroke-width:1.8}.bar{stroke-width:1.2}.dashed{stroke-dasharray:6 4}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value at x, with the lowest and highest of those it is the mean of."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart: the points of each name. With `categories`, x counts them and every point has its mark and error bar."""

    title: str
    lines: dict[str, Sequence[Point]]
    x_label: str
    log: bool = False  # else a share: its axis holds at least 0 to 1
    categories: Sequence[str] = ()
    joined: bool = True  # else the points of a name stand alone: what x counts has no order


def picture(title: str, panels: Sequence[Sequence[Panel]]) -> str:
    """Panels in rows and columns above one legend. Panels of one row share their y axis."""
    names = list(dict.fromkeys(name for row in panels for panel in row for name in panel.lines))
    width = PANEL_WIDTH * max(map(len, panels))
    below = PANEL_HEIGHT * len(panels)
    per_row = max(1, int((width - LEFT) / LEGEND_COLUMN))
    height = below + LEGEND_ROW * math.ceil(len(names) / per_row) + 12
    parts = [f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>']
    for row, some in enumerate(panels):
        low, high = limits(some)
        for column, panel in enumerate(some):
            left, top = column * PANEL_WIDTH, row * PANEL_HEIGHT
            y = Axis(low=low, high=high, start=PANEL_HEIGHT - BOTTOM, end=TOP, log=panel.log)
            parts.append(f'<g transform="translate({left:g} {top:g})">{"".join(_panel(panel, y, names))}</g>')
    for index, name in enumerate(names):
        x, y_place = LEFT + index % per_row * LEGEND_COLUMN, below + 10 + index // per_row * LEGEND_ROW
        parts.append(f'<path class="{_look(name)}" stroke="{colour(name, names)}" d="M{x:g} {y_place:g}h26"/>')
        parts.append(f'<text x="{x + 32:g}" y="{y_place + 4:g}">{escape(name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img">'
    return f"{head}<title>{escape(title)}</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"


def limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """The range of the y axis that all these panels share."""
    points = [point for panel in panels for line in panel.lines.values() for point in line]
    if panels[0].log:
        values = [max(value, SMALLEST) for point in points for value in (point.low, point.high)]
        return min(values) / 1.15, max(values) * 1.15
    return 0.0, max([1.0, *(point.high for point in points)]) * 1.04


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten, or the powers alone where the range is wide."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    return [value for power in decades for factor in factors if low <= (value := factor * 10.0**power) <= high]


def colour(name: str, names: Sequence[str]) -> str:
    """A known name's own colour; any other takes one that no known name in the picture has."""
    if name in COLOURS:
        return COLOURS[name]
    free = [value for known, value in COLOURS.items() if known not in names]
    others = [other for other in names if other not in COLOURS]
    return (free or list(COLOURS.values()))[others.index(name) % len(free or COLOURS)]


def _panel(panel: Panel, y: Axis, names: Sequence[str]) -> list[str]:
    count = len(panel.categories)
    furthest = max((point.x for line in panel.lines.values() for point in line), default=1.0)
    x = Axis(low=-0.5 if count else 0.0, high=count - 0.5 if count else furthest or 1.0, start=LEFT, end=PANEL_WIDTH - RIGHT)
    parts = [f'<text class="title" x="{LEFT:g}" y="{TOP - 14:g}">{escape(panel.title)}</text>']
    for tick in log_ticks(y.low, y.high) if y.log else nice_ticks(y.low, y.high, 6):
        at = y.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{x.end:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6:g}" y="{at + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    ticks: Iterable[tuple[float, str]] = enumerate(panel.categories) if count else [(tick, tick_text(tick)) for tick in nice_ticks(x.low, x.high, 5)]
    for place, label in ticks:
        parts.append(f'<text class="tick" x="{x.place(place):.1f}" y="{y.start + 16:g}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{x.end:g}" y1="{y.start:g}" y2="{y.start:g}"/>')
    parts.append(f'<text class="tick" x="{(x.start + x.end) / 2:g}" y="{y.start + 34:g}" text-anchor="middle">{escape(panel.x_label)}</text>')
    for name, line in panel.lines.items():
        # Side by side within a category, so that no error bar hides another.
        aside = (names.index(name) / max(1, len(names) - 1) - 0.5) * 0.5 if count else 0.0
        parts.append(_line(name, line, x, y, aside=aside, bars=count > 0, joined=panel.joined, stroke=colour(name, names)))
    return parts


def _line(name: str, points: Sequence[Point], x: Axis, y: Axis, *, aside: float, bars: bool, joined: bool, stroke: str) -> str:
    def at(value: float) -> float:
        return y.place(max(value, SMALLEST) if y.log else value)

    places = [(x.place(point.x + aside), at(point.y)) for point in points]
    parts = [f'<path class="{_look(name)}" stroke="{stroke}" d="M{"L".join(f"{left:.1f} {top:.1f}" for left, top in places)}"/>'] if joined else []
    if bars:
        for (left, top), point in zip(places, points, strict=True):
            parts.append(f'<path class="bar" stroke="{stroke}" d="M{left:.1f} {at(point.low):.1f}V{at(point.high):.1f}"/>')
            parts.append(f'<circle fill="{stroke}" cx="{left:.1f}" cy="{top:.1f}" r="2.8"><title>{escape(name)}: {point.y:.4g}</title></circle>')
    return "".join(parts)


def _look(name: str) -> str:
    return "line dashed" if name.split(":")[0].split("+")[0] in DASHED else "line"
