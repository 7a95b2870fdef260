"""``report.html``: one self-contained page for a data scientist at a hospital who opens it cold.

The page has no script, loads nothing, and its content security policy allows only its own style sheet. Whatever comes
from data is escaped: by Jinja in the page, by ElementTree in the plots.
"""

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mcrage.evaluation.comparison import headline_comparisons, site_comparisons
from mcrage.evaluation.report import ALL, FEDERATED_ARMS, GroupSize, RunResults, num_attributes
from mcrage.render import plots, tables
from mcrage.render.text import (
    ARM_NAMES,
    MODEL_NAMES,
    TEST_RECORDS,
    answer_word,
    headline,
    interval,
    name_of,
    number,
    remarks,
)

MOST_BARS = 12
"""Groups shown per site in the plot of group sizes."""

MOST_DISTRIBUTIONS = 200
"""Plots of one column within one group; what is left out stands in results.json, and the report says so."""

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class SizeBar:
    """One group in the plot of group sizes."""

    group: str
    plot: Markup
    real: str
    synthetic: str


@dataclass(frozen=True, kw_only=True)
class SizePanel:
    """Group sizes at one site."""

    site: str
    bars: list[SizeBar]
    num_hidden: int


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """One column within one group, real against synthetic."""

    column: str
    distance: float
    plot: Markup
    num_suppressed: int

    @property
    def shown_distance(self) -> str:
        """The total variation distance, rounded."""
        return number(self.distance)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A number by round."""

    title: str
    plot: Markup


def render_report(results: RunResults) -> str:
    """The text of ``report.html``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    page = environment.get_template("report.html")
    return page.render(style=Markup(style), style_hash=_hash(style), **_context(results))


def write_report(results: RunResults, path: str | Path) -> None:
    """Writes ``report.html``."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(render_report(results), encoding="utf-8")
    os.replace(temporary, path)


def size_panels(results: RunResults) -> list[SizePanel]:
    """Rows per group before and after, over the federation and at each site, each on a scale of its own."""
    by_site: dict[str, list[GroupSize]] = {}
    for size in results.group_sizes:
        by_site.setdefault(size.site, []).append(size)
    return [_size_panel(results, site=s, sizes=by_site[s]) for s in (ALL, *results.run.sites) if s in by_site]


def distributions(results: RunResults) -> tuple[list[tuple[str, list[Distribution]]], int]:
    """Plots by group, the least similar column first, and how many found no room."""
    by_group: dict[str, list[Distribution]] = {}
    minorities = results.minority_groups
    for marginal in sorted(results.marginals, key=lambda marginal: marginal.group not in minorities):
        levels = plots.levels_of(marginal)
        if not levels:
            continue
        distance = plots.total_variation(levels)
        label = f"{marginal.column}, {marginal.group}: real against synthetic, total variation {number(distance)}"
        plot = plots.distribution(levels, label=label)
        suppressed = sum(level.real is None for level in levels)
        entry = Distribution(column=marginal.column, distance=distance, plot=plot, num_suppressed=suppressed)
        by_group.setdefault(marginal.group, []).append(entry)
    shown, room = [], MOST_DISTRIBUTIONS
    for group, entries in by_group.items():
        entries.sort(key=lambda entry: -entry.distance)
        if room > 0:
            shown.append((group, entries[:room]))
        room -= len(entries)
    return shown, max(0, -room)


def curves(results: RunResults) -> list[Curve]:
    """Loss and fidelity by round, where a run has them."""
    found = []
    dropped = [(at.round, f"round {at.round}: without {', '.join(at.dropped)}") for at in results.history if at.dropped]
    for key, title in (("loss", "Training loss"), ("fidelity", "Fidelity (one-way similarity)")):
        points = [(at.round, value) for at in results.history if (value := getattr(at, key)) is not None]
        if points:
            within = [mark for mark in dropped if points[0][0] <= mark[0] <= points[-1][0]]
            plot = plots.curve_by_round(points, label=f"{title} by round", dropped=within)
            found.append(Curve(title=title, plot=plot))
    return found


def _figure(figure: tuple[float, float, float] | None) -> str:
    """A value with its 95 % interval; a dash where there is none."""
    return f"{number(figure[0])} {interval(*figure[1:])}" if figure else "–"


def _context(results: RunResults) -> dict[str, Any]:
    site_tables, groups_left_out = tables.site_tables(results)
    shown_distributions, distributions_left_out = distributions(results)
    comparisons = [*headline_comparisons(results), *site_comparisons(results)]
    run = results.run
    return {
        "run": run,
        "privacy": results.privacy,
        "attacks": [(row, _figure(row.auc), _figure(row.tpr)) for row in results.attacks],
        "schema_version": results.schema_version,
        "answer": answer_word(results),
        "headline": headline(results),
        "remarks": remarks(results),
        "headline_table": tables.headline_table(results),
        "panels": tables.forest_panels(results),
        "axis": plots.share_axis(),
        "site_tables": site_tables,
        "groups_left_out": groups_left_out,
        "metric_tables": tables.metric_tables(results),
        "size_panels": size_panels(results),
        "distributions": shown_distributions,
        "distributions_left_out": distributions_left_out,
        "curves": curves(results),
        "has_parity": results.headline_arm != "federated_parity" and "federated_parity" in results.arms,
        "federated_name": name_of(results.headline_arm, ARM_NAMES),
        "federated_names": [ARM_NAMES[arm] for arm in FEDERATED_ARMS],
        "minority_groups": results.minority_groups,
        "models": [name_of(model, MODEL_NAMES) for model in results.models],
        "num_sites": len(results.sites),
        "num_tests": sum(each.verdict is not None for each in comparisons),
        "settings": _settings(run.config),
        "test_records": TEST_RECORDS[run.test_set],
    }


def _settings(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for name, value in config.items():
        if isinstance(value, dict):
            lines += _settings(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", _setting(value)))
    return lines


def _setting(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(each) for each in value)
    return "none" if value is None else str(value)


def _size_panel(results: RunResults, *, site: str, sizes: list[GroupSize]) -> SizePanel:
    minorities = results.minority_groups
    plain = [size for size in sizes if size.group in minorities or num_attributes(size.group) == 1]
    shown = sorted(plain or sizes, key=lambda size: size.group not in minorities)[:MOST_BARS]
    largest = max((size.real or 0) + (size.synthetic or 0) for size in shown)
    bars = [_size_bar(size, largest=largest) for size in shown]
    return SizePanel(site=tables.site_name(site), bars=bars, num_hidden=len(sizes) - len(shown))


def _size_bar(size: GroupSize, *, largest: int) -> SizeBar:
    real = "not shown" if size.real is None else f"{size.real:,}"
    made = "" if size.synthetic is None else f"+ {size.synthetic:,}"
    title = f"{size.group}: {real} real rows {made} synthetic rows"
    plot = plots.size_bar(size.real or 0, size.synthetic or 0, largest=largest, title=title)
    return SizeBar(group=size.group, plot=plot, real=real, synthetic=made)


def _hash(style: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
