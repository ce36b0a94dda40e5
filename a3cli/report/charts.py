"""Coordinates of a report's charts, in percent of the plot's width and height. The template draws them."""

import math
from collections.abc import Sequence
from typing import Any

from a3cli.work.files import Json

DECADES = 6  # at most on a logarithmic axis; smaller values are negligible
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def error_curves(layers: Sequence[Json], component: str) -> Json:
    """Return loss against the kept share of the size: one line per layer, and a dot at each layer's chosen size."""
    curves = [(each["curves"][component], each["size"]) for each in layers]
    positive = [loss for curve, _ in curves for loss in curve["loss"] if loss > 0]
    if not positive:
        return {"lines": [], "dots": [], "x_ticks": [], "y_ticks": []}
    top = math.ceil(math.log10(max(positive)))
    bottom = max(min(math.floor(math.log10(min(positive))), top - 1), top - DECADES)
    full = max(curves[0][0]["size"])

    def place(size: float, loss: float) -> tuple[float, float]:
        height = (math.log10(loss) - bottom) / (top - bottom) if loss > 0 else 0.0
        return 100 * size / full, 100 * (1 - min(1.0, max(0.0, height)))

    lines, dots = [], []
    for number, (curve, size) in enumerate(curves):
        pairs = list(zip(curve["size"], curve["loss"], strict=True))
        points = [place(x, y) for x, y in pairs if y > 0 and x < full]  # the full size loses nothing
        lines.append({"path": _path(points), "opacity": _depth(number, len(curves)), "name": f"layer {number}"})
        for loss in (y for x, y in pairs if x == size):
            x, y = place(size, loss)
            dots.append({"x": x, "y": y, "name": f"layer {number}: {size} of {full} kept, loss {loss:.3g}"})
    step = max(1, math.ceil((top - bottom) / 4))
    return {
        "lines": lines,
        "dots": dots,
        "x_ticks": [{"at": at, "label": f"{at} %"} for at in (0, 25, 50, 75, 100)],
        "y_ticks": [
            {"at": 100 * (top - power) / (top - bottom), "label": "10" + str(power).translate(SUPERSCRIPT)}
            for power in range(top, bottom - 1, -step)
        ],
    }


def score_error(mean: Json, layers: Sequence[Json]) -> Json:
    """Return the score error by distance (logarithmic): one line per layer, and the mean last, drawn strongest."""
    longest = math.log2(1 + mean["distance"][-1]) or 1.0
    most = max((value for each in (mean, *layers) for value in each["relative"]), default=0.0)
    top = _round_up(100 * most) or 1.0

    def line(each: Json) -> str:
        pairs = zip(each["distance"], each["relative"], strict=True)
        return _path([(100 * math.log2(1 + x) / longest, 100 * (1 - 100 * y / top)) for x, y in pairs])

    shown = [x for i, x in enumerate(mean["distance"][:-1]) if x == 0 or math.log2(x) % 3 == 0]
    ends = [x for x in shown if math.log2(1 + x) < longest - 1.5] + [mean["distance"][-1]]
    own = [{"path": line(each), "opacity": 0.25, "name": f"layer {i}"} for i, each in enumerate(layers)]
    return {
        "lines": [*own, {"path": line(mean), "opacity": 1.0, "name": "all layers", "strong": True}],
        "dots": [],
        "x_ticks": [{"at": 100 * math.log2(1 + x) / longest, "label": f"{x:,}"} for x in ends],
        "y_ticks": [{"at": 100 - 25 * i, "label": f"{top * i / 4:g} %"} for i in range(5)],
    }


def slot_rows(slots: Any, pairs: int) -> list[Json]:
    """Return each slot's place on the axis of the source's pairs; one row for all layers, or one per layer."""
    rows = slots if slots and isinstance(slots[0], list) else [slots]
    named = [("all layers" if len(rows) == 1 else str(i), row) for i, row in enumerate(rows)]
    return [
        {
            "name": name,
            "kept": len(row),
            "dots": [
                {"x": 100 * (slot + 0.5) / pairs, "count": row.count(slot), "name": f"pair {slot:g}"}
                for slot in sorted(set(row))
            ],
        }
        for name, row in named
    ]


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
