import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mcrage.evaluation.report import RunResults
from mcrage.render import html, tables
from mcrage.render.html import render_report, write_report

Documents = Callable[..., dict[str, Any]]
VOID = {"meta", "br", "hr", "img", "input", "link", "col", "base"}


class Page(HTMLParser):
    """Elements with their attributes, visible text, and elements that were never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(document: Documents) -> str:
    return render_report(RunResults.parse(document()))


def changed(document: Documents, **changes: Any) -> str:
    return render_report(RunResults.parse(document() | changes))


def test_the_page_is_well_formed_and_under_one_megabyte(report: str) -> None:
    assert Page(report).open == []
    assert len(report.encode()) < 1_000_000
    assert report.startswith("<!doctype html>")


def test_the_page_loads_and_runs_nothing(report: str) -> None:
    page = Page(report)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "use", "image"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
        assert (attributes.get("href") or "#").startswith("#")
    style = re.findall(r"<style>(.*?)</style>", report, flags=re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]


def test_the_policy_allows_only_the_style_sheet_that_is_there(report: str) -> None:
    policy = next(m["content"] for m in Page(report).named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    style = re.findall(r"<style>(.*?)</style>", report, flags=re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_every_link_leads_to_a_section(report: str) -> None:
    page = Page(report)
    places = {attributes.get("id") for _, attributes in page.elements}
    links = [str(attributes["href"])[1:] for attributes in page.named("a")]
    assert len(links) == 9
    assert set(links) <= places


def test_the_headline_stands_before_the_tables(report: str) -> None:
    text = Page(report).text
    assert text.index("Records sampled from the model that 8 hospitals trained") < text.index("Minority group ")
    assert "No privacy claim is made." in text
    assert "simulation's yardstick" in text


@pytest.mark.parametrize("quote", ['"', "'"])
def test_names_from_data_are_escaped_everywhere(document: Documents, quote: str) -> None:
    group = f"race=<script>alert({quote}1{quote})</script>"
    column = f"{quote}><img src=x onerror=alert(1)>"
    content = document(black=group, column=column)
    content["run"]["minority_groups"] = [group]
    content["run"]["dataset"] = content["run"]["engine"] = column
    content["run"]["config"] = {column: [group]}
    content["run"]["versions"] = {column: group}
    content["history"][0]["dropped"] = [group]
    for row in content["rows"][:40]:
        row["reason"] = group
    report = render_report(RunResults.parse(content))
    page = Page(report)
    assert page.open == []
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert group in page.text
    assert column in page.text
    assert any(attributes.get("title") == group for attributes in page.named("th"))


def test_the_same_results_give_the_same_page(document: Documents, report: str) -> None:
    assert render_report(RunResults.parse(document())) == report


def test_a_verdict_is_a_word_and_a_sign_and_not_a_colour_alone(report: str) -> None:
    found = re.findall(r'<span class="verdict ([\w-]+)"><span aria-hidden="true">(.)</span> ([\w ]+)</span>', report)
    assert {(kind.replace("-", " "), sign) for kind, sign, _ in found} == set(tables.SYMBOLS.items())
    assert all(kind.replace("-", " ") == word for kind, _, word in found)


def test_groups_without_a_number_show_the_reason(report: str) -> None:
    text = Page(report).text
    assert "insufficient: 28 held-out patients, 30 needed" in text
    assert "suppressed: fewer than 11 patients" in text
    assert "no gap: pooled rows do not do better" in text


def test_values_have_three_decimals_and_their_interval(report: str) -> None:
    cells = re.findall(r'<span class="v">([^<]*)</span>(?: <span class="ci">([^<]*)</span>)?', report)
    three = r"[+−]?\d*\.\d{3}"
    percent = r"−?\d+ %"
    for value, interval in cells:
        if re.fullmatch(three, value):
            assert re.fullmatch(rf"\[{three}, {three}\]", interval)
        else:
            assert re.fullmatch(rf"{percent}|–|no gap|insufficient|suppressed|not evaluated", value)
    assert len(cells) > 1000


def test_no_small_count_is_shown(document: Documents) -> None:
    results = RunResults.parse(document())
    hidden = [size for size in results.group_sizes if size.real is None]
    assert hidden
    shown = [bar for panel in html.size_panels(results) for bar in panel.bars]
    assert {bar.synthetic for bar in shown if bar.real == "not shown"} == {""}


def test_many_groups_leave_out_tables_and_plots_and_say_so(
    document: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_TABLE_ROWS", 100)
    monkeypatch.setattr(html, "MOST_DISTRIBUTIONS", 10)
    text = Page(render_report(RunResults.parse(document()))).text
    assert "13 more groups stand in results.json" in text
    assert "14 more plots would not fit" in text


def test_the_least_similar_column_stands_first(document: Documents) -> None:
    shown, left_out = html.distributions(RunResults.parse(document()))
    assert left_out == 0
    assert [group for group, _ in shown][-1] == "race=White"
    for _, entries in shown:
        assert [entry.distance for entry in entries] == sorted((e.distance for e in entries), reverse=True)


def test_a_run_without_figures_says_what_is_missing(document: Documents) -> None:
    rows = [row for row in document()["rows"] if row["metric"] == "auroc" and row["arm"] == "local"]
    nothing: dict[str, list[Any]] = {"group_sizes": [], "marginals": [], "history": [], "gap_closed": []}
    report = changed(document, rows=rows, verdicts=[], **nothing)
    text = Page(report).text
    assert "This run cannot say." in text
    for missing in ("group sizes", "distributions that may be shown", "training history", "other metrics"):
        assert f"This run has no {missing}." in text


def test_an_empty_run_renders(document: Documents) -> None:
    run = document()["run"] | {"minority_groups": [], "minimum_cell": 1}
    text = Page(render_report(RunResults.parse({"schema_version": 1, "run": run}))).text
    assert "No group of this run counts as a minority" in text
    assert "This run has no shares of the gap." in text
    assert "Counts of 1 to" not in text


def test_marginals_that_may_not_be_shown_are_left_out(document: Documents) -> None:
    hidden = {"column": "age", "group": "race=Black", "labels": ["a"], "real": [None], "synthetic": [9]}
    assert html.distributions(RunResults.parse(document() | {"marginals": [hidden]})) == ([], 0)


def test_groups_of_several_attributes_are_shown_where_there_are_no_others(document: Documents) -> None:
    sizes = [
        {"site": "all", "group": f"race=A, sex=F, age={age}", "real": 20 + age, "synthetic": 5} for age in range(20)
    ]
    (panel,) = html.size_panels(RunResults.parse(document() | {"group_sizes": sizes}))
    assert len(panel.bars) == html.MOST_BARS
    assert panel.num_hidden == 20 - html.MOST_BARS


def test_gaps_between_groups_have_a_table_but_are_no_groups(document: Documents) -> None:
    content = document()
    gap = content["rows"][0] | {"group": "race", "metric": "equalized_odds_difference"}
    report = changed(document, rows=[*content["rows"], gap])
    assert "Equalised odds difference" in Page(report).text
    assert "<summary>race</summary>" not in report


def test_notes_are_lettered_in_order_of_use() -> None:
    notes = tables.Notes()
    marks = [notes.mark(f"reason {position}") for position in range(28)]
    assert marks[:2] + marks[-3:] == ["a", "b", "z", "aa", "ab"]
    assert notes.mark("reason 1") == "b"
    assert notes.mark("") == ""


def test_the_report_is_written_whole(tmp_path: Path, document: Documents, report: str) -> None:
    write_report(RunResults.parse(document()), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
