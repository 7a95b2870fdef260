"""The tables of ``report.html``: numbers as cells, and the reasons of missing ones as notes below the table."""

from dataclasses import dataclass, field

from markupsafe import Markup

from mcrage.evaluation.comparison import Comparison, compare
from mcrage.evaluation.report import (
    ALL,
    ARMS,
    BASELINE_ARMS,
    FEDERATED_ARMS,
    HEADLINE_METRIC,
    GapClosed,
    RunResults,
    Score,
    num_attributes,
)
from mcrage.render import plots
from mcrage.render.text import (
    ARM_NAMES,
    METRIC_NAMES,
    MODEL_NAMES,
    estimate,
    interval,
    name_of,
    number,
    percent,
    short,
    signed,
)

MOST_TABLE_ROWS = 1000
"""Rows of the group × site tables altogether; what is left out stands in results.json, and the report says so."""

SYMBOLS = {"helps": "▲", "no evidence": "○", "harms": "▼", "insufficient": "–"}
"""Verdicts without colour."""

_FOREST_ARMS = tuple(arm for arm in ARMS if arm in BASELINE_ARMS or arm in FEDERATED_ARMS)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number in a table: its value, its interval, the mark of its note, and a word such as the arm's name."""

    value: str
    interval: str = ""
    mark: str = ""
    word: str = ""


@dataclass
class Notes:
    """The reasons of one table, each with a letter in the order of their first use."""

    reasons: list[str] = field(default_factory=list)

    def mark(self, reason: str) -> str:
        """The letter of a reason; empty for no reason."""
        if not reason:
            return ""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return _letters(self.reasons.index(reason))

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Letters and reasons."""
        return [(_letters(position), reason) for position, reason in enumerate(self.reasons)]

    def cell(self, score: Score | GapClosed | None, *, style: str = "number", word: str = "") -> Cell:
        """A cell for an estimate; a dash with the mark of its reason where there is no value."""
        if score is None:
            return Cell(value="–", mark=self.mark("not evaluated"))
        if score.value is None:
            return Cell(value=short(score.reason) if style == "percent" else "–", mark=self.mark(score.reason))
        value = f"{percent(score.value)} %" if style == "percent" else number(score.value)
        bounds = interval(score.low, score.high, style=style)
        return Cell(value=value, interval=bounds, mark=self.mark(score.reason), word=word)


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One downstream model in the headline table or in a group × site table."""

    model: str
    local: Cell
    baseline: Cell
    parity: Cell
    federated: Cell
    pooled: Cell
    difference: Cell
    gap: Cell
    word: str
    symbol: str


@dataclass(frozen=True, kw_only=True)
class ComparisonBlock:
    """The lines of one group or hospital, with its number of held-out patients."""

    name: str
    n: str
    rows: list[ComparisonRow]


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """Blocks with their notes."""

    title: str
    blocks: list[ComparisonBlock]
    notes: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """One line of the forest plot."""

    arm: str
    kind: str
    plot: Markup
    cell: Cell


@dataclass(frozen=True, kw_only=True)
class ForestPanel:
    """Shares of the gap closed for one group with one downstream model, or the reason why there are none."""

    group: str
    model: str
    rows: list[ForestRow]
    reason: str
    notes: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class MetricTable:
    """One metric over the federation: a line per group and downstream model, a column per arm.

    Attributes:
        blocks: Group, and for each downstream model its name and its cells.
    """

    title: str
    arms: list[str]
    blocks: list[tuple[str, list[tuple[str, list[Cell]]]]]
    notes: list[tuple[str, str]]


def headline_table(results: RunResults) -> ComparisonTable:
    """A block per minority group, over the federation."""
    blocks = {group: compare(results, site=ALL, group=group) for group in results.minority_groups}
    return _comparison_table(blocks, title="")


def site_tables(results: RunResults) -> tuple[list[ComparisonTable], int]:
    """One table per group with a block per site, and the number of groups that found no room."""
    per_group = (len(results.sites) + 1) * max(len(results.models), 1)
    shown = results.groups[: max(1, MOST_TABLE_ROWS // per_group)]
    tables = []
    for group in shown:
        blocks = {site_name(site): compare(results, site=site, group=group) for site in (ALL, *results.sites)}
        tables.append(_comparison_table(blocks, title=group))
    return tables, len(results.groups) - len(shown)


def forest_panels(results: RunResults) -> list[ForestPanel]:
    """One panel per minority group and downstream model, with everybody last."""
    groups = [*results.minority_groups, *(group for group in results.groups if group == ALL)]
    return [_forest_panel(results, group=group, model=model) for group in groups for model in results.models]


def metric_tables(results: RunResults) -> list[MetricTable]:
    """Every metric but the headline's, over the federation, for groups of one attribute and the minorities."""
    groups: dict[str, dict[str, None]] = {}
    for row in results.rows:
        if row.site == ALL and (num_attributes(row.group) <= 1 or row.group in results.minority_groups):
            groups.setdefault(row.metric, {})[row.group] = None
    metrics = [metric for metric in METRIC_NAMES if metric in groups and metric != HEADLINE_METRIC]
    return [_metric_table(results, groups=list(groups[metric]), metric=metric) for metric in metrics]


def site_name(site: str) -> str:
    """The site, or what the federation is called."""
    return "All hospitals" if site == ALL else site


def _comparison_table(blocks: dict[str, list[Comparison]], *, title: str) -> ComparisonTable:
    notes, found = Notes(), []
    for name, comparisons in blocks.items():
        n = comparisons[0].n if comparisons else None
        rows = [_comparison_row(each, notes) for each in comparisons]
        found.append(ComparisonBlock(name=name, n="–" if n is None else f"{n:,}", rows=rows))
    return ComparisonTable(title=title, blocks=found, notes=notes.lines)


def _comparison_row(comparison: Comparison, notes: Notes) -> ComparisonRow:
    verdict, baseline = comparison.verdict, comparison.baseline
    if verdict:
        bounds = interval(verdict.low, verdict.high, style="signed")
        difference = Cell(value=signed(verdict.difference), interval=bounds)
    else:
        difference = Cell(value="–", mark=notes.mark(comparison.reason))
    return ComparisonRow(
        model=name_of(comparison.model, MODEL_NAMES),
        local=notes.cell(comparison.local),
        baseline=notes.cell(baseline, word=name_of(baseline.arm, ARM_NAMES) if baseline else ""),
        parity=notes.cell(comparison.parity),
        federated=notes.cell(comparison.federated),
        pooled=notes.cell(comparison.pooled),
        difference=difference,
        gap=notes.cell(comparison.gap, style="percent"),
        word=comparison.word,
        symbol=SYMBOLS[comparison.word],
    )


def _forest_panel(results: RunResults, *, group: str, model: str) -> ForestPanel:
    name = name_of(model, MODEL_NAMES)
    found = {arm: results.gap(site=ALL, group=group, arm=arm, model=model) for arm in _FOREST_ARMS}
    gaps = {arm: gap for arm, gap in found.items() if gap}
    if all(gap.value is None for gap in gaps.values()):
        reasons = dict.fromkeys(gap.reason for gap in gaps.values())
        return ForestPanel(group=group, model=name, rows=[], reason="; ".join(reasons) or "not evaluated", notes=[])
    notes, rows = Notes(), []
    for arm, gap in gaps.items():
        kind = "federated" if arm in FEDERATED_ARMS else "alone"
        title = f"{group}, {name}, {ARM_NAMES[arm]}: {estimate(gap, style='percent')}"
        plot = plots.share_row(gap.value, gap.low, gap.high, title=title, kind=kind)
        rows.append(ForestRow(arm=ARM_NAMES[arm], kind=kind, plot=plot, cell=notes.cell(gap, style="percent")))
    return ForestPanel(group=group, model=name, rows=rows, reason="", notes=notes.lines)


def _metric_table(results: RunResults, *, groups: list[str], metric: str) -> MetricTable:
    notes, blocks = Notes(), []
    for group in groups:
        rows = []
        for model in results.models:
            names = {"site": ALL, "group": group, "model": model, "metric": metric}
            scores = [results.score(arm=arm, **names) for arm in results.arms]
            if any(scores):
                rows.append((name_of(model, MODEL_NAMES), [notes.cell(score) for score in scores]))
        blocks.append((group, rows))
    arms = [name_of(arm, ARM_NAMES) for arm in results.arms]
    return MetricTable(title=METRIC_NAMES[metric], arms=arms, blocks=blocks, notes=notes.lines)


def _letters(position: int) -> str:
    """a, b, …, z, aa, ab, …: the note's mark."""
    letters = ""
    position += 1
    while position:
        position, rest = divmod(position - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters
