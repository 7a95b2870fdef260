"""The plots of ``report.html`` as inline SVG.

Every drawing is a tree of elements, so that names from data are escaped wherever they stand. Widths are percentages and
heights are pixels: a plot takes the width of its column while its text keeps its size. Marks carry a ``<title>``, which
browsers show as a tooltip and screen readers read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from mcrage.evaluation.report import Marginal
from mcrage.render.text import number

SHARE_RANGE = (-0.5, 1.5)
"""Shares of the gap that the axis shows; an interval that reaches further ends in an arrow."""

MOST_ROWS = 8
"""A distribution over more labels than this is drawn as a histogram, else as labelled bars."""

_LABEL_LENGTH = 26
_PLOT_LEFT, _PLOT_RIGHT = 13.0, 98.5


class Drawing:
    """An SVG element that is as wide as its container.

    Args:
        height: In pixels.
        label: What the drawing shows, in words.
        kind: Its CSS class.
    """

    def __init__(self, height: float, label: str, *, kind: str) -> None:
        attributes = {"class": kind, "width": "100%", "height": _px(height), "role": "img", "aria-label": label}
        self.root = ElementTree.Element("svg", attributes)

    def add(self, tag: str, *, kind: str, title: str = "", text: str = "", **attributes: str) -> ElementTree.Element:
        """Adds an element; ``_`` in an attribute's name stands for ``-``."""
        named = {name.replace("_", "-"): value for name, value in attributes.items()}
        element = ElementTree.SubElement(self.root, tag, {"class": kind, **named})
        element.text = text or None
        if title:
            ElementTree.SubElement(element, "title").text = title
        return element

    def line(self, start: tuple[str, str], end: tuple[str, str], *, kind: str, title: str = "") -> None:
        """A straight line between two points given as (x, y)."""
        self.add("line", kind=kind, title=title, x1=start[0], y1=start[1], x2=end[0], y2=end[1])

    def curve(self, points: Sequence[tuple[float, float]], *, kind: str, frame: tuple[float, float, float]) -> None:
        """A line through (share of the frame's width, pixels from the top) points.

        Args:
            points: At least one.
            kind: CSS class.
            frame: Left and right edge in percent, height in pixels.
        """
        left, right, height = frame
        attributes = {
            "x": _pc(left),
            "width": _pc(right - left),
            "height": _px(height),
            "viewBox": f"0 0 1000 {_px(height)}",
            "preserveAspectRatio": "none",
            "overflow": "visible",
        }
        inner = ElementTree.SubElement(self.root, "svg", attributes)
        path = " ".join(f"{_px(1000 * x)},{_px(y)}" for x, y in points)
        ElementTree.SubElement(
            inner, "polyline", {"class": kind, "points": path, "vector-effect": "non-scaling-stroke"}
        )

    def markup(self) -> Markup:
        """The drawing as text for an HTML page."""
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))


def share_row(value: float | None, low: float | None, high: float | None, *, title: str, kind: str) -> Markup:
    """One row of the forest plot: a point with its interval between *local* (0) and *pooled* (1)."""
    height, middle = 26.0, _px(13)
    drawing = Drawing(height, title, kind="forest")
    for at in (0.0, 1.0):
        drawing.line((_share_x(at), "0"), (_share_x(at), _px(height)), kind="reference")
    if value is None:
        return drawing.markup()
    if low is not None and high is not None:
        drawing.line((_share_x(low), middle), (_share_x(high), middle), kind=f"whisker {kind}", title=title)
        _arrows(drawing, low, high, kind=kind)
    if SHARE_RANGE[0] <= value <= SHARE_RANGE[1]:
        drawing.add("circle", kind=f"point {kind}", title=title, cx=_share_x(value), cy=middle, r="5")
    return drawing.markup()


def share_axis() -> Markup:
    """The axis below the rows of the forest plot."""
    drawing = Drawing(34, "axis: 0 % is local rows, 100 % is pooled real rows", kind="forest axis")
    drawing.line(("0", "1"), ("100%", "1"), kind="baseline")
    for at, name in ((0.0, "0 %"), (0.5, "50"), (1.0, "100 %")):
        drawing.line((_share_x(at), "1"), (_share_x(at), "5"), kind="baseline")
        drawing.add("text", kind="tick", text=name, x=_share_x(at), y="17", text_anchor="middle")
    for at, name in ((0.0, "local"), (1.0, "pooled")):
        drawing.add("text", kind="tick strong", text=name, x=_share_x(at), y="30", text_anchor="middle")
    return drawing.markup()


def size_bar(real: int, synthetic: int, *, largest: int, title: str) -> Markup:
    """Rows of a group before (dark) and added to it (light), on a scale that ends at ``largest``."""
    drawing = Drawing(14, title, kind="sizes")
    scale = 100 / max(largest, 1)
    left = max(real * scale, 0.6) if real else 0.0
    if real:
        drawing.add("rect", kind="real", title=title, x="0", y="2", width=_pc(left), height="10")
    if synthetic:
        drawing.add(
            "rect", kind="synthetic", title=title, x=_pc(left), y="2", width=_pc(synthetic * scale), height="10"
        )
    return drawing.markup()


@dataclass(frozen=True)
class Level:
    """One label of a column: its share of the real and of the synthetic rows; both None if it may not be shown."""

    name: str
    real: float | None
    synthetic: float | None

    @property
    def title(self) -> str:
        """The level in words."""
        if self.real is None or self.synthetic is None:
            return f"{self.name}: not shown, too few patients"
        return f"{self.name}: real {number(self.real)}, synthetic {number(self.synthetic)}"


def levels_of(marginal: Marginal) -> list[Level]:
    """Shares of the rows whose label may be shown in both; empty where there are none."""
    pairs = list(zip(marginal.real, marginal.synthetic, strict=True))
    total_real = sum(real for real, made in pairs if real is not None and made is not None)
    total_made = sum(made for real, made in pairs if real is not None and made is not None)
    if not total_real or not total_made:
        return []
    return [
        Level(name, None, None) if real is None or made is None else Level(name, real / total_real, made / total_made)
        for name, (real, made) in zip(marginal.labels, pairs, strict=True)
    ]


def total_variation(levels: Sequence[Level]) -> float:
    """Half the sum of the absolute differences: 0 for equal distributions, 1 for disjoint ones."""
    return sum(abs((level.real or 0.0) - (level.synthetic or 0.0)) for level in levels) / 2


def distribution(levels: Sequence[Level], *, label: str) -> Markup:
    """Real against synthetic shares of one column."""
    return _bars(levels, label) if len(levels) <= MOST_ROWS else _histogram(levels, label)


def curve_by_round(
    points: Sequence[tuple[int, float]], *, label: str, dropped: Sequence[tuple[int, str]] = ()
) -> Markup:
    """A number by round, with a mark on the axis wherever a site was dropped.

    Args:
        points: (round, value), in order of rounds; at least one.
        label: What the number is.
        dropped: (round, what to say about it).
    """
    height, top, bottom = 210.0, 14.0, 178.0
    drawing = Drawing(height, label, kind="curve")
    first, last = points[0][0], points[-1][0]
    ticks = nice_ticks(min(value for _, value in points), max(value for _, value in points))
    span = max(last - first, 1)

    def down(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    def across(server_round: int) -> str:
        return _pc(_PLOT_LEFT + (server_round - first) / span * (_PLOT_RIGHT - _PLOT_LEFT))

    for tick, name in zip(ticks, _tick_names(ticks), strict=True):
        y = _px(down(tick))
        drawing.line((_pc(_PLOT_LEFT), y), ("100%", y), kind="grid")
        drawing.add("text", kind="tick", text=name, x=_pc(_PLOT_LEFT - 1.5), y=y, dy="4", text_anchor="end")
    for server_round in sorted({first, (first + last) // 2, last}):
        name = f"round {server_round}" if server_round == first else str(server_round)
        x = across(server_round)
        drawing.add("text", kind="tick", text=name, x=x, y=_px(bottom + 20), text_anchor="middle")
    frame = (_PLOT_LEFT, _PLOT_RIGHT, height)
    drawing.curve([((at - first) / span, down(value)) for at, value in points], kind="trace", frame=frame)
    for at, value in points:
        title = f"round {at}: {number(value)}"
        drawing.add("circle", kind="dot", title=title, cx=across(at), cy=_px(down(value)), r="2.5")
    for at, reason in dropped:
        drawing.add(
            "text", kind="dropped", title=reason, text="×", x=across(at), y=_px(bottom + 4), text_anchor="middle"
        )
    return drawing.markup()


def nice_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Round numbers, evenly spaced, from at or below ``low`` to at or above ``high``."""
    rough = max(high - low, abs(high) * 1e-3, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(position * step, 12) for position in range(first, max(last, first + 1) + 1)]


def _tick_names(ticks: Sequence[float]) -> list[str]:
    decimals = max(len(f"{tick:.9g}".partition(".")[2]) for tick in ticks)
    return [f"{tick:.{decimals}f}".replace("-", "−") for tick in ticks]


def _arrows(drawing: Drawing, low: float, high: float, *, kind: str) -> None:
    left, right = ("0", "M-6 13l8-5v10z"), ("100%", "M6 13l-8-5v10z")
    for at, path in [left] * (low < SHARE_RANGE[0]) + [right] * (high > SHARE_RANGE[1]):
        # A path takes no percentages, so it stands in a frame that is moved instead.
        frame = drawing.add("svg", kind="edge", x=at, overflow="visible")
        ElementTree.SubElement(frame, "path", {"class": f"arrow {kind}", "d": path})


def _bars(levels: Sequence[Level], label: str) -> Markup:
    pitch = 32
    drawing = Drawing(pitch * len(levels), label, kind="bars")
    largest = _largest(levels)
    for position, level in enumerate(levels):
        top = pitch * position
        drawing.add("text", kind="name", title=level.title, text=shorten(level.name), x="0", y=_px(top + 13))
        shown = level.real is not None and level.synthetic is not None
        values = f"{number(level.real or 0)} / {number(level.synthetic or 0)}" if shown else "too few"
        drawing.add("text", kind="tick", text=values, x="100%", y=_px(top + 13), text_anchor="end")
        for kind, share, offset in (("seen", level.real, 17), ("made", level.synthetic, 23)):
            place = {"width": _pc(100 * (share or 0.0) / largest), "y": _px(top + offset)}
            drawing.add("rect", kind=kind, title=level.title, x="0", height="5", **place)
    return drawing.markup()


def _histogram(levels: Sequence[Level], label: str) -> Markup:
    height, floor = 120.0, 100.0
    drawing = Drawing(height, label, kind="histogram")
    largest, width = _largest(levels), 100 / len(levels)

    def tall(share: float | None) -> float:
        return (floor - 4) * (share or 0.0) / largest

    runs: list[list[tuple[float, float]]] = [[]]
    for position, level in enumerate(levels):
        if level.synthetic is None:
            runs.append([])
            continue
        up = tall(level.real)
        place = {"x": _pc(width * position), "width": _pc(width * 0.94), "y": _px(floor - up), "height": _px(up)}
        drawing.add("rect", kind="seen", title=level.title, **place)
        top = floor - tall(level.synthetic)
        runs[-1] += [(position / len(levels), top), ((position + 1) / len(levels), top)]
    for run in filter(None, runs):
        drawing.curve(run, kind="outline", frame=(0.0, 100.0, height))
    drawing.line(("0", _px(floor)), ("100%", _px(floor)), kind="baseline")
    for at, anchor, level in (("0", "start", levels[0]), ("100%", "end", levels[-1])):
        text = shorten(level.name, length=16)
        drawing.add("text", kind="tick", text=text, title=level.name, x=at, y=_px(floor + 15), text_anchor=anchor)
    return drawing.markup()


def _largest(levels: Sequence[Level]) -> float:
    return max(max(level.real or 0.0, level.synthetic or 0.0) for level in levels)


def shorten(text: str, *, length: int = _LABEL_LENGTH) -> str:
    """The text, its end replaced by ``…`` where it is longer than ``length``."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _share_x(share: float) -> str:
    low, high = SHARE_RANGE
    return _pc(100 * (min(max(share, low), high) - low) / (high - low))


def _pc(value: float) -> str:
    return f"{round(value, 2):g}%"


def _px(value: float) -> str:
    return f"{round(value, 1):g}"
