from itertools import pairwise
from xml.etree import ElementTree

import pytest

from mcrage.evaluation.report import Marginal
from mcrage.render import plots

HOSTILE = """<script>alert("1")</script> & 'x' " onload="y"""


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def marginal(real: list[int | None], synthetic: list[int | None]) -> Marginal:
    labels = [f"level {position}" for position in range(len(real))]
    return Marginal.model_validate(
        {"column": "age", "group": "all", "labels": labels, "real": real, "synthetic": synthetic}
    )


def percent(text: str | None) -> float:
    assert text is not None
    assert text.endswith("%")
    return float(text[:-1])


def test_a_point_stands_where_its_share_is_between_local_and_pooled() -> None:
    row = parse(plots.share_row(0.5, 0.0, 1.0, title="half", kind="federated"))
    (point,) = row.iter("circle")
    local, pooled, whisker = row.iter("line")
    assert percent(point.get("cx")) == (percent(local.get("x1")) + percent(pooled.get("x1"))) / 2
    assert (whisker.get("x1"), whisker.get("x2")) == (local.get("x1"), pooled.get("x1"))
    assert not list(row.iter("path"))


@pytest.mark.parametrize(("low", "high", "arrows"), [(-0.6, 1.0, 1), (0.0, 1.6, 1), (-3.0, 4.0, 2)])
def test_an_interval_beyond_the_axis_ends_in_an_arrow(low: float, high: float, arrows: int) -> None:
    row = parse(plots.share_row(0.5, low, high, title="wide", kind="alone"))
    assert len(list(row.iter("path"))) == arrows
    ends = [percent(line.get(end)) for line in row.iter("line") for end in ("x1", "x2")]
    assert min(ends) >= 0
    assert max(ends) <= 100


def test_a_share_beyond_the_axis_has_no_point_and_one_without_interval_no_whisker() -> None:
    assert not list(parse(plots.share_row(2.0, 1.8, 2.2, title="far", kind="alone")).iter("circle"))
    assert len(list(parse(plots.share_row(0.5, None, None, title="bare", kind="alone")).iter("line"))) == 2
    assert not list(parse(plots.share_row(None, None, None, title="none", kind="alone")).iter("circle"))


def test_the_axis_of_shares_fits_its_rows() -> None:
    axis = parse(plots.share_axis())
    places = {text.text: text.get("x") for text in axis.iter("text")}
    row = parse(plots.share_row(1.0, None, None, title="one", kind="alone"))
    assert places["pooled"] == places["100 %"] == next(row.iter("circle")).get("cx")


def test_bars_of_sizes_are_to_scale_and_a_small_one_stays_visible() -> None:
    real, made = parse(plots.size_bar(25, 50, largest=100, title="t")).iter("rect")
    assert [percent(bar.get("width")) for bar in (real, made)] == [25, 50]
    assert percent(made.get("x")) == 25
    tiny, _ = parse(plots.size_bar(1, 50, largest=100_000, title="t")).iter("rect")
    assert percent(tiny.get("width")) >= 0.5
    assert not list(parse(plots.size_bar(0, 0, largest=0, title="t")).iter("rect"))


def test_shares_leave_out_suppressed_levels_on_both_sides() -> None:
    levels = plots.levels_of(marginal([30, None, 10], [10, 99, 30]))
    assert [(level.real, level.synthetic) for level in levels] == [(0.75, 0.25), (None, None), (0.25, 0.75)]
    assert plots.total_variation(levels) == 0.5
    assert "too few" in levels[1].title


@pytest.mark.parametrize(("real", "synthetic"), [([None], [3]), ([0, 0], [1, 1]), ([20], [0])])
def test_nothing_is_drawn_of_a_column_without_rows(real: list[int | None], synthetic: list[int | None]) -> None:
    assert plots.levels_of(marginal(real, synthetic)) == []


def test_total_variation_is_zero_for_equal_and_one_for_disjoint_distributions() -> None:
    assert plots.total_variation(plots.levels_of(marginal([20, 60], [1, 3]))) == 0
    assert plots.total_variation(plots.levels_of(marginal([20, 0], [0, 3]))) == 1


def test_few_levels_are_labelled_bars_and_many_are_a_histogram() -> None:
    few = parse(plots.distribution(plots.levels_of(marginal([20, None, 40], [1, 2, 3])), label="few"))
    assert few.get("class") == "bars"
    assert "too few" in [text.text for text in few.iter("text")]
    many = parse(plots.distribution(plots.levels_of(marginal([20] * 12, [1] * 12)), label="many"))
    assert many.get("class") == "histogram"
    assert len(list(many.iter("rect"))) == 12


def test_a_histogram_keeps_the_place_of_a_suppressed_bin() -> None:
    real: list[int | None] = [20] * 10
    real[4] = None
    drawing = parse(plots.distribution(plots.levels_of(marginal(real, [5] * 10)), label="gap"))
    assert [percent(bar.get("x")) for bar in drawing.iter("rect")] == [0, 10, 20, 30, 50, 60, 70, 80, 90]
    assert len(list(drawing.iter("polyline"))) == 2


def test_a_curve_rises_where_its_values_do_and_marks_dropped_sites() -> None:
    drawing = parse(plots.curve_by_round([(1, 0.2), (2, 0.4), (3, 0.9)], label="fidelity", dropped=[(2, "without A")]))
    heights = [float(str(dot.get("cy"))) for dot in drawing.iter("circle")]
    assert heights == sorted(heights, reverse=True)
    (mark,) = [text for text in drawing.iter("text") if text.text == "×"]
    assert mark.findtext("title") == "without A"
    assert mark.get("x") == list(drawing.iter("circle"))[1].get("cx")


@pytest.mark.parametrize("points", [[(5, 0.3)], [(1, 0.0), (2, 0.0)], [(1, -2.0), (9, 1500.0)]])
def test_a_curve_stays_within_its_frame(points: list[tuple[int, float]]) -> None:
    drawing = parse(plots.curve_by_round(points, label="loss"))
    for dot in drawing.iter("circle"):
        assert 0 <= float(str(dot.get("cy"))) <= float(str(drawing.get("height")))
        assert 0 <= percent(dot.get("cx")) <= 100


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.41, 0.93), (0.7553, 0.7554), (3.0, 3.0), (-12.0, 1800.0)])
def test_ticks_are_even_and_enclose_the_values(low: float, high: float) -> None:
    ticks = plots.nice_ticks(low, high)
    steps = [b - a for a, b in pairwise(ticks)]
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7
    assert max(steps) == pytest.approx(min(steps))


def test_names_from_data_are_escaped_in_text_title_and_attribute() -> None:
    levels = [plots.Level(HOSTILE, 0.5, 0.5), plots.Level("b", 0.5, 0.5)]
    for drawing in (
        plots.distribution(levels, label=HOSTILE),
        plots.distribution(levels * 6, label=HOSTILE),
        plots.share_row(0.5, 0.1, 0.9, title=HOSTILE, kind="alone"),
        plots.size_bar(1, 2, largest=3, title=HOSTILE),
        plots.curve_by_round([(1, 0.2)], label=HOSTILE, dropped=[(1, HOSTILE)]),
    ):
        assert "<script" not in drawing
        assert HOSTILE in [value for each in parse(drawing).iter() for value in (each.text, each.get("aria-label"))]
        assert not [name for each in parse(drawing).iter() for name in each.attrib if name.startswith("on")]


def test_long_names_are_shortened_with_the_whole_in_the_title() -> None:
    name = "a very long category name that would not fit"
    drawing = parse(plots.distribution([plots.Level(name, 1.0, 1.0)], label="x"))
    text = next(iter(drawing.iter("text")))
    assert text.text is not None
    assert len(text.text) < len(name)
    assert text.text.endswith("…")
    assert name in str(text.findtext("title"))
