"""Small charts as SVG that a page holds inline: a roofline, and lines over sizes. Colours and type are the page's style sheet's; every
point says what it is in a <title>, which browsers show under the pointer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 236  # of the drawing; the page scales it to its column
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 36  # what axes and labels need


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] onto [start, stop] in the drawing, in logarithms where `log`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = True

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def decades(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], every second or third where there are many, and 2 and 5 times them where there are few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 2:
        return [v for e in range(first - 1, last + 1) for m in (1, 2, 5) if low <= (v := m * 10.0**e) <= high]
    step = 1 + (last - first) // 6
    return [10.0**e for e in range(first, last + 1, step)]


def round_steps(high: float, about: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from 0 up to `high`."""
    rough = high / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= rough), default=10)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short: 0.02, 3.5, 120, 16k, 2M."""
    for size, suffix in ((2**20, "M"), (2**10, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{suffix}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def roofline(series: Mapping[str, Sequence[Point]], tflops: float, gbps: float, unit: str, factor: float) -> str:
    """TFLOP/s (times `factor`, in `unit`) over FLOP a byte, both logarithmic, under the roof of this run's ceilings."""
    points = [point for of_one in series.values() for point in of_one]
    ridge, peak = tflops * 1e3 / gbps, tflops * factor
    low, high = min(ridge, *(p.x for p in points)) / 2, max(ridge, *(p.x for p in points)) * 2
    x = Scale(low, high, LEFT, WIDTH - RIGHT)
    bottom = min([low / ridge * peak, *(p.y for p in points)]) / 1.5
    y = Scale(bottom, peak * 2, HEIGHT - BOTTOM, TOP)
    roof = [(low, low / ridge * peak), (ridge, peak), (high, peak)]
    parts = _frame(x, y, decades(low, high), decades(bottom, peak * 2), "FLOP a byte", unit)
    parts.append(f'<polyline class="roof" points="{_path(roof, x, y)}"/>')
    parts.append(_text(x(high) - 2, y(peak) - 5, f"matmul {number(peak)}", "end", "note"))
    slope = math.degrees(math.atan2(y(roof[0][1]) - y(peak), x(ridge) - x(low)))
    if x(ridge) - x(low) > 90:
        at = f"translate({x(low):.1f} {y(roof[0][1]):.1f}) rotate({-slope:.1f})"
        parts.append(f'<text class="note" transform="{at}" x="4" y="-5">copy {number(gbps)} GB/s</text>')
    for i, (name, of_one) in enumerate(series.items()):
        parts += _marks(name, 2 * i, of_one, x, y)
    return _svg(f"roofline: {unit} over FLOP a byte", parts)


def lines(
    series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, colours: Mapping[str, int], ceiling: float | None = None
) -> str:
    """A line a name over logarithmic x, y from 0; `ceiling` as a dashed line. colours: the style sheet's number of each name."""
    points = [point for of_one in series.values() for point in of_one]
    xs = sorted({p.x for p in points})
    low, high = (xs[0] / 1.4, xs[-1] * 1.4) if len(xs) == 1 else (xs[0], xs[-1])
    top = max([p.y for p in points] + ([ceiling] if ceiling else [])) * 1.06
    x = Scale(low, high, LEFT + 10, WIDTH - RIGHT - 10)
    y = Scale(0.0, top, HEIGHT - BOTTOM, TOP, log=False)
    parts = _frame(x, y, _thinned(xs, x), round_steps(top), x_label, y_label)
    if ceiling:
        parts.append(f'<line class="ceiling" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(ceiling):.1f}" y2="{y(ceiling):.1f}"/>')
    for name, of_one in sorted(series.items(), key=lambda item: -colours[item[0]]):  # ours, number 0, over the others
        if len(of_one) > 1:
            parts.append(f'<polyline class="line s{colours[name]}" points="{_path([(p.x, p.y) for p in of_one], x, y)}"/>')
        parts += _marks(name, colours[name], of_one, x, y)
    return _svg(f"{y_label} over {x_label}", parts)


def _thinned(xs: Sequence[float], x: Scale) -> list[float]:
    """Those ticks whose labels have room."""
    kept: list[float] = []
    for value in xs:
        if not kept or x(value) - x(kept[-1]) >= 30:
            kept.append(value)
    return kept


def _frame(x: Scale, y: Scale, x_ticks: Iterable[float], y_ticks: Iterable[float], x_label: str, y_label: str) -> list[str]:
    """Grid lines, tick labels and axis titles."""
    parts = []
    for tick in y_ticks:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 6, at + 3.5, number(tick), "end"))
    for tick in x_ticks:
        parts.append(f'<line class="tick" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 15, number(tick), "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 5, x_label, "end", "label"))
    parts.append(_text(LEFT, HEIGHT - 5, f"↑ {y_label}", "start", "label"))
    return parts


def _marks(name: str, colour: int, points: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    radius = 3.4 if colour == 0 else 2.8
    return [
        f'<circle class="point s{colour}" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="{radius}">'
        f"<title>{escape(f'{name}: {p.title}')}</title></circle>"
        for p in points
    ]


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
