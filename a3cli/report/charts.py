"""Compute the coordinates of a report's charts, in percent of the plot's width and height, for the template."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from a3cli.work.manifests import ByDistance, Curve

DECADES = 6  # at most on a logarithmic axis; smaller values are negligible
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """A line; `path` is that of SVG."""

    path: str
    opacity: float
    name: str
    strong: bool = False


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    name: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    lines: list[Line] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)


@dataclass(frozen=True)
class SlotDot:
    """A slot's place; `count` slots share it."""

    x: float
    count: int
    name: str


@dataclass(frozen=True)
class SlotRow:
    name: str
    kept: int
    dots: list[SlotDot]


@dataclass(frozen=True)
class LossAxes:
    """Kept share of the full size against loss on a logarithmic axis from 10^bottom to 10^top."""

    full: int
    bottom: int
    top: int

    def place(self, size: float, loss: float) -> tuple[float, float]:
        height = (math.log10(loss) - self.bottom) / (self.top - self.bottom) if loss > 0 else 0.0
        return 100 * size / self.full, 100 * (1 - min(1.0, max(0.0, height)))

    def y_ticks(self) -> list[Tick]:
        step = max(1, math.ceil((self.top - self.bottom) / 4))
        powers = range(self.top, self.bottom - 1, -step)
        return [
            Tick(100 * (self.top - power) / (self.top - self.bottom), "10" + str(power).translate(SUPERSCRIPT))
            for power in powers
        ]


def error_curves(curves: Sequence[tuple[Curve, int]]) -> Chart:
    """Return loss against the kept share of the size: a line per layer, and a dot at each layer's chosen size."""
    positive = [loss for curve, _ in curves for loss in curve.loss if loss > 0]
    if not positive:
        return Chart()
    top = math.ceil(math.log10(max(positive)))
    bottom = max(min(math.floor(math.log10(min(positive))), top - 1), top - DECADES)
    axes = LossAxes(max(curves[0][0].size), bottom, top)
    lines, dots = [], []
    for number, (curve, size) in enumerate(curves):
        pairs = list(zip(curve.size, curve.loss, strict=True))
        points = [axes.place(x, y) for x, y in pairs if y > 0 and x < axes.full]  # the full size loses nothing
        lines.append(Line(_path(points), _depth(number, len(curves)), f"layer {number}"))
        for loss in (y for x, y in pairs if x == size):
            name = f"layer {number}: {size} of {axes.full} kept, loss {loss:.3g}"
            dots.append(Dot(*axes.place(size, loss), name))
    return Chart(lines, dots, [Tick(at, f"{at} %") for at in (0, 25, 50, 75, 100)], axes.y_ticks())


def score_error(mean: ByDistance, layers: Sequence[ByDistance]) -> Chart:
    """Return the score error by distance (logarithmic): one line per layer, and the mean last, drawn strongest."""
    longest = math.log2(1 + mean.distance[-1]) or 1.0
    most = max((value for each in (mean, *layers) for value in each.relative), default=0.0)
    top = _round_up(100 * most) or 1.0

    def path(each: ByDistance) -> str:
        pairs = zip(each.distance, each.relative, strict=True)
        return _path([(100 * math.log2(1 + x) / longest, 100 * (1 - 100 * y / top)) for x, y in pairs])

    shown = [x for i, x in enumerate(mean.distance[:-1]) if x == 0 or math.log2(x) % 3 == 0]
    ends = [x for x in shown if math.log2(1 + x) < longest - 1.5] + [mean.distance[-1]]
    lines = [Line(path(each), 0.25, f"layer {i}") for i, each in enumerate(layers)]
    return Chart(
        lines=[*lines, Line(path(mean), 1.0, "all layers", strong=True)],
        x_ticks=[Tick(100 * math.log2(1 + x) / longest, f"{x:,}") for x in ends],
        y_ticks=[Tick(100 - 25 * i, f"{top * i / 4:g} %") for i in range(5)],
    )


def slot_rows(slots: list[float] | list[list[float]], pairs: int) -> list[SlotRow]:
    """Return each slot's place on the axis of the source's pairs; one row for all layers, or one per layer."""
    rows = [each for each in slots if isinstance(each, list)]
    if not rows:
        return [slot_row("all layers", [each for each in slots if isinstance(each, float)], pairs)]
    return [slot_row(str(i) if len(rows) > 1 else "all layers", row, pairs) for i, row in enumerate(rows)]


def slot_row(name: str, row: list[float], pairs: int) -> SlotRow:
    dots = [SlotDot(100 * (slot + 0.5) / pairs, row.count(slot), f"pair {slot:g}") for slot in sorted(set(row))]
    return SlotRow(name, len(row), dots)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points or [(0, 100)])


def _depth(layer: int, layers: int) -> float:
    """Return the opacity of a layer's line: deeper layers are stronger."""
    return 0.3 + 0.7 * (layer + 1) / layers


def _round_up(value: float) -> float:
    """Round up to 1, 2, 4, 6 or 8 times a power of ten."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))
