"""A figure by epsilon as inline SVG: a line per generator and place of the noise, with intervals."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mcrage.render.plots import Drawing, nice_ticks
from simulations.privacy_budget.summary import Estimate

_LEFT, _RIGHT = 13.0, 98.0
_TOP, _BOTTOM, _HEIGHT = 14.0, 196.0, 236.0
_APART = 1.1  # percent of the width between the intervals of two series at one epsilon
_TEXT = "3.5"


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        name: In words.
        kind: Its CSS class.
        estimates: One per epsilon; without a value where there is none.
    """

    name: str
    kind: str
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class Reference:
    """A level to compare with, drawn across."""

    name: str
    value: float


def by_epsilon(
    epsilons: Sequence[float], series: Sequence[Series], *, label: str, references: Sequence[Reference] = ()
) -> Markup | None:
    """The figure; None where there is nothing to draw.

    Args:
        epsilons: At equal distances, in this order; an infinite one is ∞.
        series: Lines over them.
        label: What the figure shows, in words.
        references: Levels, such as the hospitals' own rows.
    """
    values = [end for each in series for one in each.estimates for end in _ends(one)]
    if not values:
        return None
    values += [each.value for each in references if math.isfinite(each.value)]
    ticks = nice_ticks(min(values), max(values))
    drawing = Drawing(_HEIGHT, label, kind="budget")
    _axes(drawing, epsilons, ticks)
    for reference in references:
        if math.isfinite(reference.value):
            y = _down(reference.value, ticks)
            drawing.line(
                (_pc(_LEFT), y), (_pc(_RIGHT), y), kind="level", title=f"{reference.name}: {reference.value:.3f}"
            )
            drawing.add("text", kind="tick level-name", text=reference.name, x=_pc(_LEFT + 0.5), y=y, dy="-4")
    for number, each in enumerate(series):
        _draw(drawing, epsilons, each, ticks, shift=(number - (len(series) - 1) / 2) * _APART)
    return drawing.markup()


def key(kind: str) -> Markup:
    """The mark of a series, for the legend."""
    drawing = Drawing(12, "", kind="mark")
    drawing.line(("0", "6"), ("100%", "6"), kind=f"join {kind}")
    drawing.add("circle", kind=f"at {kind}", cx="50%", cy="6", r="3.6")
    return drawing.markup()


def _axes(drawing: Drawing, epsilons: Sequence[float], ticks: Sequence[float]) -> None:
    decimals = max(len(f"{tick:.9g}".partition(".")[2]) for tick in ticks)
    for tick in ticks:
        y = _down(tick, ticks)
        drawing.line((_pc(_LEFT), y), (_pc(_RIGHT), y), kind="zero" if tick == 0 else "grid")
        text = f"{tick:.{decimals}f}".replace("-", "−")
        drawing.add("text", kind="tick", text=text, x=_pc(_LEFT - 1.5), y=y, dy=_TEXT, text_anchor="end")
    for place, epsilon in enumerate(epsilons):
        text = "∞" if math.isinf(epsilon) else f"{epsilon:g}"
        text = f"ε = {text}" if not place else text
        x = _pc(_across(place, len(epsilons)))
        drawing.add("text", kind="tick", text=text, x=x, y=_px(_BOTTOM + 20), text_anchor="middle")


def _draw(drawing: Drawing, epsilons: Sequence[float], series: Series, ticks: Sequence[float], *, shift: float) -> None:
    points = [
        (_across(place, len(epsilons)) + shift, one)
        for place, one in enumerate(series.estimates)
        if math.isfinite(one.value)
    ]
    for (x, one), (next_x, next_one) in itertools.pairwise(points):
        start, end = (_pc(x), _down(one.value, ticks)), (_pc(next_x), _down(next_one.value, ticks))
        drawing.line(start, end, kind=f"join {series.kind}")
    for (x, one), epsilon in zip(
        points, (e for e, o in zip(epsilons, series.estimates, strict=True) if math.isfinite(o.value)), strict=True
    ):
        title = f"{series.name}, ε = {'∞' if math.isinf(epsilon) else f'{epsilon:g}'}: {one.value:.3f}"
        if math.isfinite(one.low):
            title += f" [{one.low:.3f}, {one.high:.3f}]"
            ends = (_pc(x), _down(one.low, ticks)), (_pc(x), _down(one.high, ticks))
            drawing.line(*ends, kind=f"reach {series.kind}", title=title)
        drawing.add("circle", kind=f"at {series.kind}", title=title, cx=_pc(x), cy=_down(one.value, ticks), r="3.6")


def _ends(one: Estimate) -> list[float]:
    return (
        [value for value in (one.value, one.low, one.high) if math.isfinite(value)] if math.isfinite(one.value) else []
    )


def _across(place: int, number: int) -> float:
    margin = 7.0
    return _LEFT + margin + place * (_RIGHT - _LEFT - 2 * margin) / max(number - 1, 1)


def _down(value: float, ticks: Sequence[float]) -> str:
    return _px(_BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_BOTTOM - _TOP))


def _pc(value: float) -> str:
    return f"{round(value, 2):g}%"


def _px(value: float) -> str:
    return f"{round(value, 1):g}"
